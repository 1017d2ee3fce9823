"""The recipe of a folder of pairs, all that decides what its shards hold, and the manifest that records it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from r2f_ext import distributed
from r2f_ext.errors import R2FError
from r2f_ext.json_file import read_json_file

SCHEMA = 3
MANIFEST = "manifest.json"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of finished pairs.

    Raises:
        R2FError: it cannot be read, or it is not what `write_pairs` wrote.
    """
    remedy = "delete the folder and run r2f pairs again, or name another one"
    manifest = read_json_file(path, "damaged", remedy)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list) or "schema" not in manifest:
        raise R2FError(f"'{path}' is damaged: {remedy}.")
    return manifest


def shards_of(recipe: dict[str, Any]) -> range:
    """The numbers of all shards."""
    return range(-(-recipe["count"] // recipe["batch_groups"]))


def size_of(shard: int, recipe: dict[str, Any]) -> int:
    """Number of pairs in a shard."""
    groups: int = recipe["batch_groups"]
    return min(groups, recipe["count"] - shard * groups)


def run_of(recipe: dict[str, Any]) -> str:
    """Identifies the run that a recipe describes: equal recipes make equal shards."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def check_same_everywhere(recipe: dict[str, Any]) -> None:
    """Refuse a distributed run whose processes would make different files; the sentence names what differs."""
    for other in distributed.gather(recipe):
        if (key := _first_difference(other, recipe)) is not None:
            why = "GPUs of different memory" if key == "batch_groups" else _difference(key, other, recipe)
            raise R2FError(
                f"the processes of this run would not make the same files ({why}): use GPUs of one kind and the same "
                "inputs everywhere, or one process."
            )


def check_same_recipe(folder: Path, manifest: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Refuse to write over finished pairs of another recipe; the sentence names what differs."""
    if (key := _first_difference(manifest, recipe)) is not None:
        raise R2FError(
            f"'{folder}' holds finished pairs of another recipe ({_difference(key, manifest, recipe)}): name another "
            "--out, or delete the folder first."
        )


def _first_difference(manifest: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    """The first key, `count` before all others, in which a recipe differs from another or from a manifest."""
    manifest, recipe = json.loads(json.dumps([manifest, recipe]))  # as JSON has it: tuples are lists
    keys = ("count", *recipe, *manifest)
    return next((key for key in keys if key != "shards" and recipe.get(key) != manifest.get(key)), None)


def _difference(key: str, manifest: dict[str, Any], recipe: dict[str, Any]) -> str:
    """How two recipes differ in `key`, in words."""
    known = {
        "layers": "other layers, rank or alpha",
        "start_sha256": "another adapter, whose A differs",
        "base_sha256": "other weights of the base",
        "proxy_sha256": "other proxy images, by --proxy or --seed",
        "training": "another training of the victims",
        "factors_of": "gradients of other pairs",
    }
    return known.get(key, f"{key} {manifest.get(key)}, not {recipe.get(key)}")

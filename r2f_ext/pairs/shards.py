"""Pairs on disk: safetensors shards, and a manifest written last.

manifest.json              schema, base, layers, proxy, how the pairs were made, count, shard names with their SHA-256
start.safetensors          A of every layer that all victims started from; b/NAME where B was not 0
pairs-00000.safetensors    update/NAME float32, images uint8, labels; a0/NAME where every victim has its own A;
                           a/NAME, A after the steps, where they moved it
factors-00000.safetensors  x/NAME and delta/NAME bfloat16; or gradient/NAME bfloat16, where it was to be dense
pairs-00000.json           only while a run is unfinished: the manifest entry of this shard

Shard i holds the pairs from i * batch_groups on (`shard_groups` of the source), whichever process makes it: several
processes divide the work by shards, and an interrupted run makes only those that are missing. Threads write shards
while the next ones are made. A finished folder is never made anew: the same recipe finds it finished (damaged shards
are made again), and another recipe is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from r2f_ext import distributed
from r2f_ext.errors import R2FError
from r2f_ext.files import need_space, output_folder, sha256, sha256_of, write_atomically, write_tensors, write_text
from r2f_ext.linalg import first_not_finite
from r2f_ext.pairs.generate import PairSource
from r2f_ext.pairs.manifest import (
    MANIFEST,
    SCHEMA,
    check_same_everywhere,
    check_same_recipe,
    read_manifest,
    run_of,
    shards_of,
    size_of,
)
from r2f_ext.progress import Advance
from r2f_ext.types import PairBatch

# bfloat16 keeps every exponent of float32 (deltas can be as small as 1e-8); its rounding lowers the cosine of G with
# the exact gradient by 1e-6.
FACTOR_DTYPE = torch.bfloat16
GPU_WRITERS = 4  # threads that write and hash: a single one is slower than the GPU and than the disk


class WritablePairs(PairSource, Protocol):
    """Pairs with a recipe for the manifest."""

    @property
    def recipe(self) -> dict[str, Any]:
        """All that decides what the pairs are, beside the layers and their A: `proxy`, `group_size`, and others."""
        ...

    @property
    def shard_groups(self) -> int:
        """Number of pairs in a file, at most that of a batch; files start at its multiples."""
        ...

    @property
    def b(self) -> dict[str, Tensor] | None:
        """name -> B that all victims start from [d_out, r]; None for B = 0."""
        ...

    def factors_file(self, shard: int) -> Path | None:
        """A file that already holds a shard's gradients, for pairs made from stored ones; None where there is none."""
        ...


@dataclass(frozen=True)
class PairsPlan:
    """The pairs that a folder is to hold, and which of them it holds already; `write` makes the rest.

    Attributes:
        count: number of pairs; found: how many are in shards that are whole already, over all processes.
        size: bytes of all pairs.
        finished: the folder held all of these pairs before.
        replaces: the folder holds unfinished pairs of another recipe, which `write` removes.
    """

    pairs: WritablePairs
    folder: Path
    recipe: dict[str, Any]
    count: int
    found: int
    size: int
    finished: bool
    replaces: bool
    stored: list[dict[str, Any]]  # the shards of the manifest that was found
    mine: tuple[int, ...]  # the missing shards that this process makes

    def write(self, advance: Advance) -> Path:
        """Write the missing pairs and return the manifest's path; `advance` is called with numbers of pairs just made.

        Raises:
            R2FError: a victim is not finite, or the disk is full.
        """
        pairs, run = self.pairs, run_of(self.recipe)
        if self.replaces and distributed.rank() == 0:
            for path in _of_other_runs(self.folder, self.recipe):
                path.unlink(missing_ok=True)
        distributed.barrier()
        writers = GPU_WRITERS if pairs.target.base.device.type == "cuda" else 1
        writing: deque[Future[int]] = deque()
        # Whatever ends this context, it waits for the shards that are being written: none is left half-written.
        with ThreadPoolExecutor(writers) as threads:
            for shard in self.mine:
                first = shard * pairs.shard_groups
                (batch,) = pairs.batches(first, first + size_of(shard, self.recipe))
                files = _files_of(self, shard, batch)
                if len(writing) == writers:
                    advance(writing.popleft().result())
                writing.append(threads.submit(_write_shard, self, shard, files, run))
            while writing:
                advance(writing.popleft().result())
        distributed.barrier()
        if distributed.rank() == 0:
            _finish(self, run)
        distributed.barrier()
        return self.folder / MANIFEST


def plan_pairs(pairs: WritablePairs, count: int, folder: str | Path, dense: bool = False) -> PairsPlan:
    """Compare the first `count` pairs with what the folder holds; nothing but the folder itself is made.

    A run that was cut off, even by SIGKILL, leaves its finished shards; the same call then makes the others, and ends
    with the same files to the bit. In a distributed run each process writes its share of the shards.

    Args:
        dense: write gradients out instead of as factors.

    Raises:
        R2FError: the folder cannot be written to, holds finished pairs of another recipe or a damaged manifest, the
            disk cannot hold the pairs, or the processes of a distributed run disagree on the recipe.
    """
    folder = output_folder(folder)
    recipe = _recipe(pairs, count, dense)
    check_same_everywhere(recipe)
    manifest = read_manifest(folder / MANIFEST) if (folder / MANIFEST).exists() else None
    if manifest is not None:
        check_same_recipe(folder, manifest, recipe)
    stored = manifest["shards"] if manifest is not None else []
    mine = shards_of(recipe)[distributed.rank() :: distributed.world_size()]
    missing = tuple(shard for shard in mine if _record(folder, shard, recipe, stored) is None)
    each = _bytes_of_pair(pairs, folder, recipe["dense"])
    to_make = sum(distributed.gather(sum(size_of(shard, recipe) for shard in missing)))
    need_space(folder, each * to_make)
    return PairsPlan(
        pairs,
        folder,
        recipe,
        count,
        found=count - to_make,
        size=each * count,
        finished=manifest is not None and to_make == 0,
        replaces=manifest is None and bool(_of_other_runs(folder, recipe)),
        stored=stored,
        mine=missing,
    )


def write_pairs(pairs: WritablePairs, count: int, folder: str | Path, advance: Advance, dense: bool = False) -> Path:
    """Write the first `count` pairs, as far as the folder does not hold them, and return the manifest's path.

    Raises:
        R2FError: see `plan_pairs` and `PairsPlan.write`.
    """
    return plan_pairs(pairs, count, folder, dense).write(advance)


def _check_finite(tensors: dict[str, Tensor], first: int) -> None:
    """Refuse pairs that are not finite, and name the victim; row 0 of `tensors` is victim `first`.

    Raises:
        R2FError: a tensor holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        if (row := first_not_finite(tensor)) is not None:
            raise R2FError(
                f"{name} of victim {first + row} holds NaN or infinity, so no pair is written of it: check the weights "
                "of the base and the proxy images, or make the pairs with --precision float32."
            )


def _recipe(pairs: WritablePairs, count: int, dense: bool) -> dict[str, Any]:
    """All that decides what the shards will hold."""
    return {
        "schema": SCHEMA,
        "base": pairs.target.base.spec,
        "base_sha256": sha256_of(pairs.target.base.model.state_dict().values()),
        "layers": [asdict(layer) for layer in pairs.target.layers],
        "start_sha256": sha256_of(pairs.a.values()),
        "dense": dense,
        **pairs.recipe,
        "batch_groups": pairs.shard_groups,
        "count": count,
    }


def shard_names(shard: int) -> tuple[str, str]:
    """The files of the updates and samples, and of the gradients."""
    return f"pairs-{shard:05d}.safetensors", f"factors-{shard:05d}.safetensors"


def _record(
    folder: Path, shard: int, recipe: dict[str, Any], stored: list[dict[str, Any]], verify: bool = True
) -> dict[str, Any] | None:
    """The manifest entry of a complete shard, from the record of an unfinished run of the same recipe or from the
    existing manifest; None if there is none.
    """
    names = shard_names(shard)
    try:
        record = _read_record(folder, shard)
        if record.pop("run", None) != run_of(recipe):
            record = stored[shard]
        if record["name"] != names[0]:
            return None
        whole = not verify or [sha256(folder / name) for name in names] == [record["sha256"], record["factors_sha256"]]
    except (OSError, KeyError, TypeError, IndexError):
        return None
    return record if whole else None


def _read_record(folder: Path, shard: int) -> dict[str, Any]:
    """The record that an unfinished run wrote of a shard; {} if there is no file or it holds no record."""
    try:
        record = json.loads((folder / f"pairs-{shard:05d}.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _of_other_runs(folder: Path, recipe: dict[str, Any]) -> list[Path]:
    """The files of shards that unfinished runs of other recipes left in the folder."""
    found = []
    for path in sorted(folder.glob("pairs-*.json")):
        number = path.stem.removeprefix("pairs-")
        if number.isdecimal() and _read_record(folder, int(number)).get("run") != run_of(recipe):
            found += [path, *(folder / name for name in shard_names(int(number)))]
    return found


@dataclass(frozen=True)
class _Files:
    """The tensors of one shard's two files, on the host; no gradients where another file holds them already."""

    updates: dict[str, Tensor]
    gradients: dict[str, Tensor]


def _files_of(plan: PairsPlan, shard: int, batch: PairBatch) -> _Files:
    """Check a shard's tensors and copy them to the host.

    Raises:
        R2FError: a victim is not finite.
    """
    cached = plan.pairs.factors_file(shard)
    files = _Files(_updates(batch), {} if cached is not None else _factors(batch, plan.recipe["dense"]))
    for tensors in (files.updates, files.gradients):
        _check_finite(tensors, shard * plan.pairs.shard_groups)
    return _Files(_on_host(files.updates), _on_host(files.gradients))


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in pinned memory of tensors on a GPU: queued together, and waited for once."""
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return tensors
    found = {name: torch.empty_like(tensor, device="cpu", pin_memory=True) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        found[name].copy_(tensor, non_blocking=True)
    torch.cuda.synchronize(device)
    return found


def _write_shard(plan: PairsPlan, shard: int, files: _Files, run: str) -> int:
    """Write both files and the record; returns how many pairs they hold.

    Raises:
        R2FError: the disk is full.
    """
    name, factors = (plan.folder / part for part in shard_names(shard))
    cached = plan.pairs.factors_file(shard)
    if cached is None:
        write_tensors(factors, files.gradients)
    else:
        write_atomically(factors, lambda temporary: _link(cached, temporary))
    write_tensors(name, files.updates)
    count = len(files.updates["labels"])
    record = {"name": name.name, "count": count, "sha256": sha256(name), "factors_sha256": sha256(factors)}
    write_text(name.with_suffix(".json"), json.dumps({**record, "run": run}))
    return count


def _finish(plan: PairsPlan, run: str) -> None:
    """Write the common start and the manifest, then remove the records of the shards."""
    folder, shards = plan.folder, shards_of(plan.recipe)
    start = dict(plan.pairs.a)
    start |= {f"b/{name}": tensor for name, tensor in (plan.pairs.b or {}).items()}
    write_tensors(folder / "start.safetensors", start)
    records = [_record(folder, shard, plan.recipe, plan.stored, verify=False) for shard in shards]
    write_text(folder / MANIFEST, json.dumps({**plan.recipe, "shards": records}, indent=2))
    for shard in shards:
        (folder / f"pairs-{shard:05d}.json").unlink(missing_ok=True)


def _link(source: Path, to: Path) -> None:
    """Make a hard link to a file if the disk supports it, otherwise a copy."""
    to.unlink(missing_ok=True)
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)


def _bytes_of_pair(pairs: WritablePairs, folder: Path, dense: bool) -> int:
    """Bytes that one pair takes on disk, from the first one."""
    (batch,) = pairs.batches(0, 1)
    tensors = _updates(batch)
    cached = pairs.factors_file(0)
    if cached is None or cached.stat().st_dev != folder.stat().st_dev:
        tensors |= _factors(batch, dense)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _updates(batch: PairBatch) -> dict[str, Tensor]:
    tensors = {f"update/{name}": update for name, update in batch.updates.items()}
    tensors |= {f"a0/{name}": a for name, a in (batch.a0 or {}).items()}
    tensors |= {f"a/{name}": a for name, a in (batch.a or {}).items()}
    return {**tensors, "images": (batch.images * 255).round().to(torch.uint8), "labels": batch.labels}


def _factors(batch: PairBatch, dense: bool) -> dict[str, Tensor]:
    if dense:
        return {f"gradient/{name}": batch.gradients.dense(name).to(FACTOR_DTYPE) for name in batch.gradients.x}
    tensors = {f"x/{name}": x.to(FACTOR_DTYPE) for name, x in batch.gradients.x.items()}
    return tensors | {f"delta/{name}": delta.to(FACTOR_DTYPE) for name, delta in batch.gradients.delta.items()}

"""Pairs on disk: safetensors shards, and a manifest written last.

manifest.json              schema, base, layers, proxy, how the pairs were made, count, shard names with their SHA-256
start.safetensors          A of every layer that all victims started from; b/NAME where B was not 0
pairs-00000.safetensors    update/NAME float32, images uint8, labels; a0/NAME where every victim has its own A;
                           a/NAME, A after the steps, where they moved it
factors-00000.safetensors  x/NAME and delta/NAME bfloat16; or gradient/NAME bfloat16, where it was to be dense
pairs-00000.json           only while a run is unfinished: the manifest entry of this shard

Shard i holds the pairs from i * batch_groups on, whichever process makes it: several processes divide the work by
shards, and an interrupted run makes only those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from r2f_ext import distributed
from r2f_ext.files import need_space, output_folder, sha256, sha256_of, write_atomically, write_tensors, write_text
from r2f_ext.pairs.generate import PairSource
from r2f_ext.progress import Advance
from r2f_ext.types import PairBatch

SCHEMA = 3
# bfloat16 keeps every exponent of float32 (deltas can be as small as 1e-8); its rounding moves G by a cosine of 1e-6.
FACTOR_DTYPE = torch.bfloat16


class WritablePairs(PairSource, Protocol):
    """Pairs with a recipe for the manifest."""

    @property
    def recipe(self) -> dict[str, Any]:
        """All that decides what the pairs are, beside the layers and their A: `proxy`, `group_size`, and others."""
        ...

    @property
    def batch_groups(self) -> int:
        """Pairs of a batch; batches start at its multiples."""
        ...

    @property
    def b(self) -> dict[str, Tensor] | None:
        """name -> B that all victims start from [d_out, r]; None for B = 0."""
        ...

    def factors_file(self, shard: int) -> Path | None:
        """A file that already holds a shard's gradients, for pairs made from stored ones; None where there is none."""
        ...


def write_pairs(
    pairs: WritablePairs,
    count: int,
    folder: str | Path,
    advance: Advance,
    dense: bool = False,
    tell: Callable[[int], None] = lambda size: None,
) -> Path:
    """Write the first `count` pairs and return the manifest's path.

    A run that was cut off, even by SIGKILL, leaves its finished shards; the same call then makes the others, and ends
    with the same files to the bit. In a distributed run each process writes its share of the shards.

    Args:
        dense: write gradients out instead of as factors.
        tell: called with the total size of the pairs in bytes, before the first is written.

    Raises:
        R2FError: the folder cannot be written to, or the disk cannot hold them.
    """
    folder = output_folder(folder)
    plan = _plan(pairs, count, dense)
    run = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    shards = range(-(-count // pairs.batch_groups))
    mine = shards[distributed.rank() :: distributed.world_size()]
    missing = [shard for shard in mine if _record(folder, shard, run) is None]

    def size(shard: int) -> int:
        return min(pairs.batch_groups, count - shard * pairs.batch_groups)

    each = _bytes_of_pair(pairs, folder, plan["dense"])
    tell(each * count)
    need_space(folder, each * sum(map(size, missing)) * distributed.world_size())
    if distributed.rank() == 0:
        (folder / "manifest.json").unlink(missing_ok=True)
    advance(sum(map(size, mine)) - sum(map(size, missing)))
    for shard in missing:
        (batch,) = pairs.batches(shard * pairs.batch_groups, shard * pairs.batch_groups + size(shard))
        _write_shard(folder, shard, batch, pairs, run, plan["dense"])
        advance(size(shard))
    distributed.barrier()
    if distributed.rank() == 0:
        _finish(pairs, folder, plan, run, shards)
    distributed.barrier()
    return folder / "manifest.json"


def _plan(pairs: WritablePairs, count: int, dense: bool) -> dict[str, Any]:
    """All that decides what the shards will hold."""
    return {
        "schema": SCHEMA,
        "base": pairs.target.base.spec,
        "base_sha256": sha256_of(pairs.target.base.model.state_dict().values()),
        "layers": [asdict(layer) for layer in pairs.target.layers],
        "start_sha256": sha256_of(pairs.a.values()),
        "dense": dense,
        **pairs.recipe,
        "batch_groups": pairs.batch_groups,
        "count": count,
    }


def shard_names(shard: int) -> tuple[str, str]:
    """The files of the updates and samples, and of the gradients."""
    return f"pairs-{shard:05d}.safetensors", f"factors-{shard:05d}.safetensors"


def _record(folder: Path, shard: int, run: str, verify: bool = True) -> dict[str, Any] | None:
    """What an unfinished run wrote down of a shard that is whole; None where there is none of this run."""
    names = shard_names(shard)
    try:
        record = json.loads((folder / f"pairs-{shard:05d}.json").read_text())
        if record.pop("run") != run or record["name"] != names[0]:
            return None
        whole = not verify or [sha256(folder / name) for name in names] == [record["sha256"], record["factors_sha256"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def _write_shard(folder: Path, shard: int, batch: PairBatch, pairs: WritablePairs, run: str, dense: bool) -> None:
    name, factors = (folder / part for part in shard_names(shard))
    cached = pairs.factors_file(shard)
    if cached is None:
        write_tensors(factors, _factors(batch, dense))
    else:
        write_atomically(factors, lambda temporary: _link(cached, temporary))
    write_tensors(name, _updates(batch))
    record = {"name": name.name, "count": len(batch.labels), "sha256": sha256(name), "factors_sha256": sha256(factors)}
    write_text(name.with_suffix(".json"), json.dumps({**record, "run": run}))


def _finish(pairs: WritablePairs, folder: Path, plan: dict[str, Any], run: str, shards: range) -> None:
    start = dict(pairs.a)
    start |= {f"b/{name}": tensor for name, tensor in (pairs.b or {}).items()}
    write_tensors(folder / "start.safetensors", start)
    records = [_record(folder, shard, run, verify=False) for shard in shards]
    write_text(folder / "manifest.json", json.dumps({**plan, "shards": records}, indent=2))
    for shard in shards:
        (folder / f"pairs-{shard:05d}.json").unlink()


def _link(source: Path, to: Path) -> None:
    """A second name for a file where the disk can, else a copy."""
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

"""Pairs on disk: safetensors shards with gradients as factors, and a manifest written last.

manifest.json            schema, base, layers, proxy, how the pairs were made, count, shard names with their SHA-256
start.safetensors        A of every layer
pairs-00000.safetensors  update/NAME float32, x/NAME and delta/NAME bfloat16, images uint8, labels
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.files import need_space, output_folder, sha256, sha256_of, write_tensors, write_text
from r2f_ext.pairs.generate import PairSource, project
from r2f_ext.progress import Advance
from r2f_ext.types import AdaptedLayer, BaseModel, FactoredGradient, PairBatch, Target


class WritablePairs(PairSource, Protocol):
    """Pairs that know how they are made."""

    @property
    def recipe(self) -> dict[str, Any]:
        """All that decides what the pairs are, beside the layers and their A: `proxy`, `group_size`, and others."""
        ...


SCHEMA = 1
UNFINISHED = "unfinished.json"  # what a manifest will say, and the shards so far
# bfloat16 keeps every exponent of float32 (deltas can be as small as 1e-8); its rounding moves G by a cosine of 1e-6.
FACTOR_DTYPE = torch.bfloat16


def write_pairs(pairs: WritablePairs, count: int, folder: str | Path, advance: Advance) -> Path:
    """Write the first `count` pairs and return the manifest's path.

    A run that was cut off leaves its finished shards and `unfinished.json`; the same call then goes on after them, and
    ends with the same files to the bit.

    Raises:
        R2FError: the folder cannot be written to, or the disk cannot hold them.
    """
    folder = output_folder(folder)
    plan = _plan(pairs, count)
    shards = _finished_shards(folder, plan)
    written = sum(shard["count"] for shard in shards)
    (folder / "manifest.json").unlink(missing_ok=True)
    advance(written)
    room_checked = False
    for batch in pairs.batches(written, count):
        if not room_checked:
            need_space(folder, shard_bytes(batch) * -(-(count - written) // len(batch.labels)))
            room_checked = True
        name = f"pairs-{len(shards):05d}.safetensors"
        write_tensors(folder / name, _shard(batch))
        shards.append({"name": name, "count": len(batch.labels), "sha256": sha256(folder / name)})
        write_text(folder / UNFINISHED, json.dumps({**plan, "shards": shards}))
        advance(len(batch.labels))
    write_tensors(folder / "start.safetensors", pairs.a)
    manifest = {**plan, "count": sum(shard["count"] for shard in shards), "shards": shards}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=2))
    (folder / UNFINISHED).unlink(missing_ok=True)
    return folder / "manifest.json"


def _plan(pairs: WritablePairs, count: int) -> dict[str, Any]:
    """All that decides what the shards will hold."""
    return {
        "schema": SCHEMA,
        "base": pairs.target.base.spec,
        "layers": [asdict(layer) for layer in pairs.target.layers],
        "start_sha256": sha256_of(pairs.a.values()),
        **pairs.recipe,
        "count": count,
    }


def _finished_shards(folder: Path, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole shards that a run of the same plan left behind, up to the first that is missing or changed."""
    try:
        left = json.loads((folder / UNFINISHED).read_text())
        shards = left.pop("shards")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    if left != json.loads(json.dumps(plan)):
        return []
    whole = []
    for shard in shards:
        path = folder / _plain_name(shard["name"])
        if not path.is_file() or sha256(path) != shard["sha256"]:
            break
        whole.append(shard)
    return whole


def shard_bytes(batch: PairBatch) -> int:
    """Bytes that `batch` takes on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _shard(batch).values())


def _shard(batch: PairBatch) -> dict[str, Tensor]:
    tensors = {f"update/{name}": update for name, update in batch.updates.items()}
    tensors |= {f"x/{name}": x.to(FACTOR_DTYPE) for name, x in batch.gradients.x.items()}
    tensors |= {f"delta/{name}": delta.to(FACTOR_DTYPE) for name, delta in batch.gradients.delta.items()}
    return {**tensors, "images": (batch.images * 255).round().to(torch.uint8), "labels": batch.labels}


class StoredPairs:
    """Pairs read back from a folder, for the same base.

    Raises:
        R2FError: no manifest (an unfinished run), another schema, or shards that are missing or changed.
    """

    def __init__(self, folder: str | Path, base: BaseModel) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise R2FError(f"'{folder}' holds no finished pairs (no manifest.json): run r2f pairs --out '{folder}'.")
        try:
            self.manifest = json.loads(path.read_text())
            if self.manifest["schema"] != SCHEMA:
                raise R2FError(
                    f"{path} has schema {self.manifest['schema']}, this version reads {SCHEMA}: make it anew."
                )
            if self.manifest["base"] != base.spec:
                raise R2FError(
                    f"the pairs in '{folder}' were made on base '{self.manifest['base']}', not '{base.spec}': "
                    "pass the same --base."
                )
            layers = tuple(AdaptedLayer(**layer) for layer in self.manifest["layers"])
            self._shards = [(_plain_name(s["name"]), int(s["count"]), s["sha256"]) for s in self.manifest["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise R2FError(f"{path} is damaged: run r2f pairs again.") from error
        self.target = Target(base, layers)
        self._verified: set[str] = set()
        self.a = self._start()
        self.fingerprint = hashlib.sha256("".join(s[2] for s in self._shards).encode()).hexdigest()

    def __len__(self) -> int:
        return sum(count for _, count, _ in self._shards)

    def updates(self, start: int, stop: int) -> dict[str, Tensor]:
        """name -> updates [stop - start, d_out, r]."""
        parts = [batch.updates for batch in self.batches(start, stop)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.target.names}

    def samples(self) -> tuple[Tensor, Tensor]:
        """Images [n, c, h, w] in [0, 1] and labels [n] of pairs of one sample each.

        Raises:
            R2FError: the pairs are of larger groups.
        """
        if self.manifest["group_size"] != 1:
            raise R2FError("the amortised route needs pairs of one sample each: make them with group size 1.")
        parts = [(batch.images[:, 0], batch.labels[:, 0]) for batch in self.batches()]
        return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])

    def _load(self, name: str, digest: str | None = None) -> dict[str, Tensor]:
        """One file; its SHA-256 is compared with `digest` the first time."""
        path = self.folder / name
        try:
            if digest is not None and name not in self._verified:
                if sha256(path) != digest:
                    raise ValueError(name)
                self._verified.add(name)
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise R2FError(f"'{path}' is missing or damaged: run r2f pairs again.") from error

    def _start(self) -> dict[str, Tensor]:
        """A [r, d_in] of every layer, on the base's device."""
        a = self._load("start.safetensors")
        for layer in self.target.layers:
            if layer.name not in a or a[layer.name].shape != (layer.rank, layer.d_in):
                raise R2FError(f"'{self.folder}' does not hold A of {layer.name}: run r2f pairs again.")
        return {layer.name: a[layer.name].to(self.target.base.device) for layer in self.target.layers}

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        stop = len(self) if stop is None else min(stop, len(self))
        first = 0
        for name, count, digest in self._shards:
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                tensors = {k: v[low - first : high - first] for k, v in self._load(name, digest).items()}
                yield self._batch(tensors)
            first += count

    def _batch(self, tensors: dict[str, Tensor]) -> PairBatch:
        device = self.target.base.device

        def part(prefix: str) -> dict[str, Tensor]:
            return {name: tensors[f"{prefix}/{name}"].to(device, torch.float32) for name in self.target.names}

        images = tensors["images"].to(device, torch.float32).div(255)
        gradient = FactoredGradient(part("x"), part("delta"))
        return PairBatch(part("update"), gradient, images, tensors["labels"].to(device))


class ReprojectedPairs:
    """Pairs of another adapter from stored ones: from B = 0 the factors of a gradient are the same for every A.

    A second adapter of a base then costs one projection a pair, no pass through the model.

    Args:
        stored: pairs of one step of SGD, of at least these layers.
        target: base and layers of the adapter.
        a: name -> its A [r, d_in].

    Raises:
        R2FError: the stored pairs lack a layer, or their victims trained for steps (their gradients depend on A).
    """

    def __init__(self, stored: StoredPairs, target: Target, a: dict[str, Tensor]) -> None:
        if "training" in stored.manifest:
            raise R2FError(
                f"the pairs in '{stored.folder}' are of victims that trained for steps: their gradients depend on A, "
                "so they serve no other adapter; make new pairs."
            )
        absent = [name for name in target.names if name not in stored.target.names]
        if absent:
            raise R2FError(f"the pairs in '{stored.folder}' do not hold {absent[0]}: make them for all its layers.")
        self.stored, self.target, self.a = stored, target, a

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def recipe(self) -> dict[str, Any]:
        """How the pairs are made: for manifests."""
        kept = {key: self.stored.manifest[key] for key in ("proxy", "group_size")}
        return {**kept, "factors_of": self.stored.fingerprint}

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        names = self.target.names
        for batch in self.stored.batches(start, stop):
            x, delta = batch.gradients.x, batch.gradients.delta
            gradient = FactoredGradient({name: x[name] for name in names}, {name: delta[name] for name in names})
            yield PairBatch(project(self.target, gradient, self.a), gradient, batch.images, batch.labels)


def _plain_name(name: str) -> str:
    """A file's name from a manifest, which is not trusted with a path."""
    if Path(name).name != name:
        raise ValueError(name)
    return name

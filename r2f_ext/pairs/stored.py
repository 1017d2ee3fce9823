"""Reads pairs back from disk, and converts stored pairs for another adapter."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r2f_ext.capture.project import project
from r2f_ext.errors import R2FError
from r2f_ext.files import sha256, sha256_of
from r2f_ext.models import differing_layer
from r2f_ext.pairs.manifest import MANIFEST, SCHEMA, read_manifest
from r2f_ext.pairs.shards import shard_names
from r2f_ext.pairs.simulation import Training
from r2f_ext.pairs.starts import random_a
from r2f_ext.types import AdaptedLayer, BaseModel, FactoredGradient, LoraUpdate, PairBatch, Target


class StoredPairs:
    """Pairs read back from a folder, for the same base.

    Attributes:
        a: name -> A [r, d_in] at the victims' common start.
        training: how the victims trained; None: one step of SGD on one group of images.
        b: name -> B [d_out, r] at the start; None if B = 0.
        target: gradients are read for its layers only, updates for all layers of the folder.

    Raises:
        R2FError: no manifest (an unfinished run), a damaged one, or one of another schema or base; when a shard is
            first read, that it is missing, changed or not finite.
    """

    def __init__(self, folder: str | Path, base: BaseModel) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise R2FError(f"'{folder}' holds no finished pairs (no manifest.json): run r2f pairs --out '{folder}'.")
        self.manifest = read_manifest(path)
        try:
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
            shards = self.manifest["shards"]
            self._digests: dict[str, str] = {}
            for shard, record in enumerate(shards):
                if record["name"] != shard_names(shard)[0]:
                    raise ValueError(record["name"])
                self._digests |= dict(
                    zip(shard_names(shard), (record["sha256"], record["factors_sha256"]), strict=True)
                )
            self._counts = [int(record["count"]) for record in shards]
            self.batch_groups = int(self.manifest["batch_groups"])
            self.group_size = int(self.manifest["group_size"])
            self.dense = bool(self.manifest["dense"])
            recipe = self.manifest.get("training")
            self.training = None if recipe is None else Training(**recipe)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise R2FError(f"'{path}' is damaged: delete the folder and run r2f pairs again.") from error
        self.target = Target(base, layers)
        self._all_names = self.target.names
        self._verified: set[str] = set()
        self.a, self.b = self._start()
        self.fingerprint = hashlib.sha256("".join(self._digests.values()).encode()).hexdigest()

    def __len__(self) -> int:
        return sum(self._counts)

    @property
    def one_step(self) -> bool:
        """Whether every victim took one step of plain SGD from B = 0."""
        return self.b is None and (self.training is None or self.training.plain_step)

    @property
    def per_victim_a(self) -> bool:
        """Whether each victim started from an A of its own."""
        return "per_victim_a" in self.manifest

    def check_same_a(self, adapter: LoraUpdate) -> None:
        """Refuse pairs that were not made with this adapter's A.

        Raises:
            R2FError: each victim has its own A, or a layer's A differs (the sentence names it).
        """
        if self.per_victim_a:
            raise R2FError(f"each victim of '{self.folder}' has its own A: make pairs without --per-victim-a.")
        name = differing_layer(self.a, adapter.start)
        if name is not None:
            raise R2FError(
                f"the pairs in '{self.folder}' were made for another adapter (A of {name} differs): make new ones."
            )

    def only(self, names: tuple[str, ...]) -> StoredPairs:
        """The same pairs with the gradients of the layers `names` only, and the updates of all layers."""
        some = copy.copy(self)
        some.target = replace(self.target, layers=tuple(self.target.layer(name) for name in names))
        return some

    def factors_file(self, shard: int) -> Path:
        """The file of a shard's gradients."""
        return self.folder / shard_names(shard)[1]

    def updates(self, start: int, stop: int) -> dict[str, Tensor]:
        """name -> updates [stop - start, d_out, r]."""
        keys = {f"update/{name}": name for name in self._all_names}
        parts = [self._read(shard_names(shard)[0], list(keys), rows) for shard, rows in self._rows(start, stop)]
        return {name: torch.cat([part[key] for part in parts]) for key, name in keys.items()}

    def samples(self) -> tuple[Tensor, Tensor]:
        """Images [n, c, h, w] in [0, 1] and labels [n] of pairs of one sample each.

        Raises:
            R2FError: the pairs are of larger groups.
        """
        if self.group_size != 1:
            raise R2FError("the amortised route needs pairs of one sample each: make them with group size 1.")
        keys = ["images", "labels"]
        parts = [self._read(shard_names(shard)[0], keys, rows) for shard, rows in self._rows(0, len(self))]
        images = torch.cat([part["images"][:, 0] for part in parts])
        return images.float().div_(255), torch.cat([part["labels"][:, 0] for part in parts])

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        names = self.target.names
        for shard, rows in self._rows(start, len(self) if stop is None else stop):
            pairs, factors = shard_names(shard)
            starts = [f"a0/{name}" for name in self._all_names] if self.per_victim_a else []
            found = self._read(
                pairs, [*(f"update/{name}" for name in self._all_names), *starts, "images", "labels"], rows, ("a/",)
            )
            if self.dense:
                dense = self._read(factors, [f"gradient/{name}" for name in names], rows)
                gradient = FactoredGradient.of_dense({n: dense[f"gradient/{n}"].float() for n in names})
            else:
                read = self._read(factors, [f"{part}/{name}" for part in ("x", "delta") for name in names], rows)
                gradient = FactoredGradient(
                    {n: read[f"x/{n}"] for n in names}, {n: read[f"delta/{n}"] for n in names}
                ).float32()
            yield PairBatch(
                _part(found, "update/"),
                gradient,
                found["images"].float().div_(255),
                found["labels"],
                _part(found, "a0/") or None,
                _part(found, "a/") or None,
            )

    def _rows(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The shards, and the rows in each, of the pairs `start` to `stop - 1`."""
        first = 0
        for shard, count in enumerate(self._counts):
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                yield shard, slice(low - first, high - first)
            first += count

    def _read(
        self, name: str, keys: list[str], rows: slice | None, prefixes: tuple[str, ...] = ()
    ) -> dict[str, Tensor]:
        """Read rows of the tensors `keys`, and of those whose names start with a prefix, from one file.

        On first use the SHA-256 of a shard is compared with the manifest, and its numbers must be finite.
        """
        path = self.folder / name
        try:
            if name in self._digests and name not in self._verified:
                if sha256(path) != self._digests[name]:
                    raise ValueError(name)
                _check_finite(path)
                self._verified.add(name)
            with safe_open(path, "pt", device=str(self.target.base.device)) as file:
                wanted = [*keys, *(key for key in file.keys() if key.startswith(prefixes))] if prefixes else keys  # noqa: SIM118
                return {key: file.get_tensor(key) if rows is None else file.get_slice(key)[rows] for key in wanted}
        except (SafetensorError, OSError, ValueError) as error:
            raise R2FError(f"'{path}' is missing or damaged: run the same r2f pairs again.") from error

    def _start(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """A [r, d_in] and B [d_out, r] of every layer, on the base's device."""
        found = self._read("start.safetensors", [], None, ("",))
        for layer in self.target.layers:
            if layer.name not in found or found[layer.name].shape != (layer.rank, layer.d_in):
                raise R2FError(f"'{self.folder}' does not hold A of {layer.name}: run the same r2f pairs again.")
        return {name: found[name] for name in self.target.names}, _part(found, "b/") or None


def _check_finite(path: Path) -> None:
    """Refuse a shard that holds NaN or infinity: an earlier version wrote victims whose training diverged.

    Raises:
        R2FError: the sentence names the tensor.
    """
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise R2FError(
                    f"'{path}' holds NaN or infinity in {key}: delete the folder and make the pairs again, with a "
                    "smaller --lr if their victims trained for steps."
                )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


class ReprojectedPairs:
    """Pairs of another adapter, computed from stored ones: at B = 0 the factors of a gradient do not depend on A.

    A second adapter of a base then costs one projection per pair and no pass through the model. On disk it needs space
    for its updates only, because the files of the gradients are shared.

    Args:
        stored: pairs of one step of SGD, of at least these layers.
        target: base and layers of the adapter.
        a: name -> its A [r, d_in].
        per_victim_a: a seed, to let every victim draw an A of its own (see `random_a`) instead of `a`.

    Raises:
        R2FError: the stored pairs lack a layer, were made with other weights, or their victims trained for steps (their
            gradients depend on A).
    """

    one_step = True
    b = None  # an adapter at PEFT's start: B = 0

    def __init__(
        self, stored: StoredPairs, target: Target, a: dict[str, Tensor], per_victim_a: int | None = None
    ) -> None:
        if not stored.one_step:
            raise R2FError(
                f"the pairs in '{stored.folder}' are of victims that trained for steps or did not start from B = 0: "
                "their gradients depend on A, so they serve no other adapter; make new pairs."
            )
        absent = [name for name in target.names if name not in stored.target.names]
        if absent:
            raise R2FError(f"the pairs in '{stored.folder}' do not hold {absent[0]}: make them for all its layers.")
        if stored.manifest["base_sha256"] != sha256_of(target.base.model.state_dict().values()):
            raise R2FError(
                f"the pairs in '{stored.folder}' were made with other weights of '{target.base.spec}' (a head that was "
                "trained along?): make new pairs."
            )
        self.stored, self.target, self.a, self.a_seed = stored.only(target.names), target, a, per_victim_a
        self.shard_groups, self.group_size = stored.batch_groups, stored.group_size

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def per_victim_a(self) -> bool:
        return self.a_seed is not None

    @property
    def recipe(self) -> dict[str, Any]:
        """How the pairs are made: for manifests."""
        same = {key: self.stored.manifest[key] for key in ("proxy", "group_size", "dense")}
        made = {**same, "factors_of": self.stored.fingerprint}
        return made if self.a_seed is None else {**made, "per_victim_a": self.a_seed}

    def factors_file(self, shard: int) -> Path:
        """The file of a shard's gradients."""
        return self.stored.factors_file(shard)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        first = start
        for batch in self.stored.batches(start, stop):
            groups = len(batch.labels)
            a0 = None if self.a_seed is None else random_a(self.target, self.a_seed, first, groups)
            updates = project(self.target, batch.gradients, self.a if a0 is None else a0)
            yield PairBatch(updates, batch.gradients, batch.images, batch.labels, a0)
            first += groups

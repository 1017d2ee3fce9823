"""Pairs in memory: for fits that share them, for fits to several sources at once, and for adapters of other layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from r2f_ext.capture.project import project
from r2f_ext.data import ImageSet
from r2f_ext.decoders import Updates
from r2f_ext.errors import R2FError
from r2f_ext.pairs import GeneratedPairs, PairSource
from r2f_ext.types import FactoredGradient, PairBatch, Target

MOST_BYTES = 3 << 30  # limit for the tensors of one `PairsInMemory`


@dataclass
class PairsInMemory:
    """A `PairSource` that keeps its pairs in memory, so that iterating over them again does not run the model.

    A pair of the embedded base with all its layers takes 1.7 MB at r = 8.

    Attributes:
        target: the layers whose gradients are held; updates may be those of further layers.
        a: name -> the A that all victims start from [r, d_in].
        parts: the batches, in order.
        one_step, per_victim_a, group_size: see `PairSource`.
    """

    target: Target
    a: dict[str, Tensor]
    parts: tuple[PairBatch, ...]
    one_step: bool = True
    per_victim_a: bool = False
    group_size: int = 1

    @classmethod
    def of(cls, pairs: PairSource, count: int | None = None, layers: Sequence[str] | None = None) -> PairsInMemory:
        """The first `count` pairs of a source.

        Args:
            layers: hold the gradients of these layers only; None: of all. The updates of all layers are held.

        Raises:
            R2FError: they take more than MOST_BYTES.
        """
        names = pairs.target.names if layers is None else tuple(layers)
        target = replace(pairs.target, layers=tuple(each for each in pairs.target.layers if each.name in names))
        parts: list[PairBatch] = []
        size = 0
        for batch in pairs.batches(0, count):
            x, delta = ({n: of[n] for n in target.names} for of in (batch.gradients.x, batch.gradients.delta))
            parts.append(replace(batch, gradients=FactoredGradient(x, delta)))
            size += _bytes_of(parts[-1])
            if size > MOST_BYTES:
                raise R2FError(
                    f"the pairs of base '{target.base.spec}' take more than {MOST_BYTES / 2**30:.0f} GiB: run this "
                    "study on a smaller base."
                )
        return cls(target, pairs.a, tuple(parts), pairs.one_step, pairs.per_victim_a, pairs.group_size)

    @classmethod
    def of_images(cls, target: Target, images: ImageSet) -> PairsInMemory:
        """The gradients at the start, without updates; `seen_by` adds those of an adapter. Raises what `of` raises."""
        blank = {layer.name: torch.zeros(1, layer.d_in, device=target.base.device) for layer in target.layers}
        found = cls.of(GeneratedPairs(target, blank, images))
        return replace(found, a={}, parts=tuple(replace(batch, updates={}) for batch in found.parts))

    def seen_by(self, target: Target, a: dict[str, Tensor]) -> PairsInMemory:
        """The pairs of an adapter with A = `a` at the start, of any rank and on any subset of these layers.

        At B = 0 the gradients do not depend on A, so that one capture serves every adapter of the base.

        Args:
            a: name -> [r, d_in]; further layers are ignored.
        """
        own, parts = {name: a[name] for name in target.names}, []
        for batch in self.parts:
            x, delta = ({n: of[n] for n in target.names} for of in (batch.gradients.x, batch.gradients.delta))
            gradient = FactoredGradient(x, delta)
            parts.append(replace(batch, updates=project(target, gradient, own), gradients=gradient))
        return replace(self, target=target, a=own, parts=tuple(parts))

    def __len__(self) -> int:
        return sum(len(batch.labels) for batch in self.parts)

    def __add__(self, other: PairsInMemory) -> PairsInMemory:
        """The pairs of both. Their bases may differ but have one architecture; `target` is that of `self`."""
        return replace(self, parts=self.parts + other.parts)

    def with_updates(self, updates: Updates) -> PairsInMemory:
        """The same pairs with other updates, name -> [n, d_out, r]."""
        sizes = [len(batch.labels) for batch in self.parts]
        split = {name: each.split(sizes) for name, each in updates.items()}
        parts = (
            replace(batch, updates={name: each[number] for name, each in split.items()})
            for number, batch in enumerate(self.parts)
        )
        return replace(self, parts=tuple(parts))

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        """The pairs `start` to `stop`, in the batches that they were made in."""
        first, stop = 0, len(self) if stop is None else stop
        for batch in self.parts:
            rows = slice(max(start - first, 0), max(stop - first, 0))
            first += len(batch.labels)
            if len(batch.labels[rows]):
                yield _rows_of(batch, rows)

    def labels(self, start: int, stop: int) -> Tensor:
        """The label of the first image of the pairs `start` to `stop`."""
        return torch.cat([batch.labels[:, 0] for batch in self.batches(start, stop)])


def _bytes_of(batch: PairBatch) -> int:
    """Of the tensors' storages: the identity of `FactoredGradient.of_dense`, which all pairs share, counts once."""
    tensors = (*batch.updates.values(), *batch.gradients.x.values(), *batch.gradients.delta.values(), batch.images)
    storages = [each.untyped_storage() for each in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _rows_of(batch: PairBatch, rows: slice) -> PairBatch:
    def of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: each[rows] for name, each in tensors.items()}

    return PairBatch(
        of(batch.updates),
        FactoredGradient(of(batch.gradients.x), of(batch.gradients.delta)),
        batch.images[rows],
        batch.labels[rows],
        batch.a0 and of(batch.a0),
        batch.a and of(batch.a),
    )

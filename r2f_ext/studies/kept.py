"""Pairs in memory: for fits that share them, and for fits to several sources at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from r2f_ext.data import ImageSet
from r2f_ext.decoders import Updates
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import FactoredGradient, PairBatch, Target


@dataclass
class KeptPairs:
    """Pairs in memory, of one step of plain SGD on one image each, from one start.

    Several may be put one after another, also of different bases of one architecture, where `target` is the first's.
    """

    target: Target
    a: dict[str, Tensor]
    kept: tuple[PairBatch, ...]
    group_size = 1
    one_step = True
    per_victim_a = False

    @classmethod
    def of(cls, target: Target, a: dict[str, Tensor], images: ImageSet) -> KeptPairs:
        """One pair an image."""
        return cls(target, a, tuple(GeneratedPairs(target, a, images).batches()))

    def __len__(self) -> int:
        return sum(len(batch.labels) for batch in self.kept)

    def __add__(self, other: KeptPairs) -> KeptPairs:
        return replace(self, kept=self.kept + other.kept)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        first, stop = 0, len(self) if stop is None else stop
        for batch in self.kept:
            rows = slice(max(start - first, 0), max(stop - first, 0))
            first += len(batch.labels)
            if len(batch.labels[rows]):
                yield _rows_of(batch, rows)

    def updates(self, count: int) -> Updates:
        """name -> updates [count, d_out, r] of the first pairs."""
        parts = [batch.updates for batch in self.batches(0, count)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.target.names}


def _rows_of(batch: PairBatch, rows: slice) -> PairBatch:
    updates, x, delta = (
        {name: each[rows] for name, each in of.items()}
        for of in (batch.updates, batch.gradients.x, batch.gradients.delta)
    )
    return PairBatch(updates, FactoredGradient(x, delta), batch.images[rows], batch.labels[rows])

"""Pairs of adapters of any layers and rank, from gradients that are captured once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from r2f_ext.capture.project import project
from r2f_ext.data import ImageSet
from r2f_ext.errors import R2FError
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.pairs.memory import budget, sample_bytes
from r2f_ext.types import FactoredGradient, PairBatch, Target


class CapturedPairs:
    """A source of pairs whose gradients are captured once and stay in memory, for adapters of any layers and rank.

    At B = 0 gradients do not depend on A, so that one capture of all layers serves every adapter of the base. A pair
    of the embedded base takes 1.6 MB.

    Args:
        target: the adapter's layers; all of them are among those that were captured.
        a: name -> its A [r, d_in]; further layers are ignored.
        kept: batches of gradients, images and labels, as `capture_all` gives them.
    """

    one_step, per_victim_a = True, False

    def __init__(self, target: Target, a: dict[str, Tensor], kept: Sequence[PairBatch]) -> None:
        self.target, self.a, self.kept = target, {name: a[name] for name in target.names}, kept

    def __len__(self) -> int:
        return sum(len(batch.labels) for batch in self.kept)

    @property
    def group_size(self) -> int:
        return self.kept[0].labels.shape[1]

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        """The pairs `start` to `stop`, in the batches that they were captured in."""
        stop, first = len(self) if stop is None else stop, 0
        for batch in self.kept:
            rows = slice(max(start - first, 0), max(stop - first, 0))
            first += len(batch.labels)
            if len(batch.labels[rows]):
                x, delta = (
                    {n: of[n][rows] for n in self.target.names} for of in (batch.gradients.x, batch.gradients.delta)
                )
                gradient = FactoredGradient(x, delta)
                updates = project(self.target, gradient, self.a)
                yield PairBatch(updates, gradient, batch.images[rows], batch.labels[rows])


def capture_all(target: Target, public: ImageSet, group_size: int = 1) -> list[PairBatch]:
    """Gradients at the start, without updates, of all the target's layers, for `CapturedPairs`.

    Raises:
        R2FError: they do not fit into the memory that one pass may use (`r2f_ext.pairs.memory`).
    """
    needed, allowed = len(public) * sample_bytes(target).factors, budget(target.base.device)
    if needed > allowed:
        raise R2FError(
            f"the gradients of {len(public)} images on base '{target.base.spec}' take {needed / 2**30:.1f} GiB, more "
            f"than {allowed / 2**30:.1f}: run this study on a smaller base."
        )
    blank = {layer.name: torch.zeros(1, layer.d_in, device=target.base.device) for layer in target.layers}
    pairs = GeneratedPairs(target, blank, public, group_size)
    return [replace(batch, updates={}) for batch in pairs.batches()]

"""Pairs over many A's, for decoders that know no A: fitted once to a base, they serve adapters of any start.

At B_0 = 0 a gradient does not depend on A, so every pair may have an A of its own at the cost of a projection. The
decoders read what the update holds exactly, s G P_A = (s G A^T) (A A^T)^-1 A, in coordinates that do not depend on A:
s L^T G P_A R (`Core`). `AgnosticPairs` puts it in the place of the updates, so ridge, kernel ridge and the MLP fit to
it unchanged; `view` does the same to updates to be decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from r2f_ext.decoders.base import Updates
from r2f_ext.decoders.checkpoint import Checkpoint
from r2f_ext.decoders.core import Core
from r2f_ext.errors import R2FError
from r2f_ext.pairs import PairSource
from r2f_ext.types import PairBatch

ANY_A = "any_a"  # the name of the core beside those of decoders
ANY_A_KINDS = ("ridge", "kernel_ridge", "mlp")  # the others are made from one A
SIZE = 48


class AgnosticPairs:
    """Pairs whose victims have each an A of their own, seen in coordinates that do not depend on it.

    Args:
        pairs: of one step of SGD from B = 0, made with `per_victim_a`.
        core: of all layers that the pairs have updates of.

    Raises:
        R2FError: the pairs' victims trained for steps, so that their gradients depend on A.
    """

    def __init__(self, pairs: PairSource, core: Core) -> None:
        _need_one_step(pairs)
        self.pairs, self.core = pairs, core
        self.target, self.a = pairs.target, pairs.a
        self.one_step, self.per_victim_a, self.group_size = pairs.one_step, pairs.per_victim_a, pairs.group_size

    def __len__(self) -> int:
        return len(self.pairs)

    def view(self, updates: Updates, a: dict[str, Tensor]) -> Updates:
        """Updates s G A^T [P, d_out, r] of adapters with A [r, d_in], or [P, r, d_in] -> s L^T G P_A R [P, p, q]."""
        seen = {}
        for name, right in self.core.right.items():
            factor = a[name].to(updates[name])
            coordinates = torch.linalg.solve(factor @ factor.mT, factor @ right)
            seen[name] = (self.core.left[name].mT @ updates[name]) @ coordinates
        return seen

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        """The pairs `start` to `stop`, in batches.

        Raises:
            R2FError: the victims do not have each an A of their own.
        """
        for batch in self.pairs.batches(start, stop):
            if batch.a0 is None:
                raise R2FError("the pairs are all of one A: make them with r2f pairs --per-victim-a.")
            yield replace(batch, updates=self.view(batch.updates, batch.a0))

    def updates(self, start: int, stop: int) -> Updates:
        """name -> what the pairs `start` to `stop` are seen as [stop - start, p, q]."""
        parts = [batch.updates for batch in self.batches(start, stop)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def shared_core(pairs: PairSource, count: int, checkpoint: Checkpoint) -> Core:
    """The core of all layers, put together from what each process takes from the first `count` pairs of its own."""
    _need_one_step(pairs)
    if not checkpoint.holds(ANY_A):
        checkpoint.save(ANY_A, Core.of(pairs, count, SIZE).state())
    return Core.of_state(checkpoint.load(ANY_A, pairs.target.base.device), pairs.a)


def _need_one_step(pairs: PairSource) -> None:
    if not pairs.one_step:
        raise R2FError(
            "the pairs are of victims that trained for several steps: their gradients depend on A; use one-step pairs."
        )

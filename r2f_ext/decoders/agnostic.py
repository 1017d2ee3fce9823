"""Pairs with many different A's, for decoders that are independent of A (docs/methods.md, section 5).

Such decoders are fitted once to a base and apply to an adapter with any initial A. At B_0 = 0 a gradient does not
depend on A, so each pair can have its own A at the cost of one projection. The input of the decoders is the exactly
observed part of the gradient, s G P_A = (s G A^T) (A A^T)^-1 A, in coordinates that do not depend on A:
s L^T G P_A R (`Core`). `AgnosticPairs` substitutes it for the updates, so that ridge, kernel ridge and the MLP are
fitted without change; `view` applies the same map to the updates to decode. `ProductPairs` and `ConcatenatedPairs` are
the same pairs in the two other forms that a decoder could read, BA and A beside B (Liu et al., Recover-to-Forget).
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
from r2f_ext.pairs import PairSource, updates_of
from r2f_ext.types import PairBatch

ANY_A = "any_a"  # name of the saved core, next to the names of decoder kinds
ANY_A_KINDS = ("ridge", "kernel_ridge", "mlp")  # the other kinds use one fixed A
SIZE = 48  # of the core


class AgnosticPairs:
    """Pairs with one A per victim, whose updates are given in coordinates that do not depend on A.

    Args:
        pairs: one SGD step from B = 0, generated with `per_victim_a`.
        core: a core for every layer that the pairs have updates of.

    Raises:
        R2FError: the victims took several steps, so that their gradients depend on A.
    """

    def __init__(self, pairs: PairSource, core: Core) -> None:
        _need_one_step(pairs)
        self.pairs, self.core = pairs, core
        self.target, self.a = pairs.target, pairs.a
        self.one_step, self.per_victim_a, self.group_size = pairs.one_step, pairs.per_victim_a, pairs.group_size

    def __len__(self) -> int:
        return len(self.pairs)

    def view(self, updates: Updates, a: dict[str, Tensor]) -> Updates:
        """Updates s G A^T [P, d_out, r] with A [r, d_in] or [P, r, d_in] -> name -> s L^T G P_A R [P, p, q]."""
        seen = {}
        for name, right in self.core.right.items():
            factor = a[name].to(updates[name])
            coordinates = torch.linalg.solve(factor @ factor.mT, factor @ right)
            seen[name] = (self.core.left[name].mT @ updates[name]) @ coordinates
        return seen

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        """The pairs `start` to `stop`, in batches.

        Raises:
            R2FError: all victims share one A.
        """
        for batch in self.pairs.batches(start, stop):
            if batch.a0 is None:
                raise R2FError("the pairs all share one A: generate them with r2f pairs --per-victim-a.")
            yield replace(batch, updates=self.view(batch.updates, batch.a0))

    def updates(self, start: int, stop: int) -> Updates:
        """name -> projected updates of the pairs `start` to `stop`, [stop - start, p, q]."""
        return updates_of(self, start, stop)


class ProductPairs(AgnosticPairs):
    """Pairs with an A each, seen as the product BA in the directions of the core: s L^T G A^T A R [P, p, q]."""

    def view(self, updates: Updates, a: dict[str, Tensor]) -> Updates:
        left, right = self.core.left, self.core.right
        return {n: (left[n].mT @ updates[n]) @ (a[n].to(updates[n]) @ right[n]) for n in right}


class ConcatenatedPairs(AgnosticPairs):
    """Pairs with an A each, seen as B and A side by side [P, d_out + d_in, r].

    A is scaled to the norm of B, so that decoders stay homogeneous in B.
    """

    def view(self, updates: Updates, a: dict[str, Tensor]) -> Updates:
        found = {}
        for name, update in updates.items():
            factor = a[name].to(update).mT.expand(len(update), -1, -1)
            scale = update.flatten(1).norm(dim=1) / factor.flatten(1).norm(dim=1)
            found[name] = torch.cat([update, factor * scale[:, None, None]], dim=1)
        return found


def shared_core(pairs: PairSource, count: int, checkpoint: Checkpoint) -> Core:
    """The core of all layers: each process computes that of its own layers from the first `count` pairs.

    Raises:
        R2FError: the victims took several steps, or the checkpoint cannot be written.
    """
    _need_one_step(pairs)
    if not checkpoint.holds(ANY_A):
        checkpoint.save(ANY_A, Core.of(pairs, count, SIZE).state())
    return Core.of_state(checkpoint.load(ANY_A, pairs.target.base.device), pairs.a)


def _need_one_step(pairs: PairSource) -> None:
    if not pairs.one_step:
        raise R2FError(
            "the victims of these pairs took several steps, so their gradients depend on A: use one-step pairs."
        )

"""Pairs over many A's, for decoders that know no A: fitted once to a base, they serve adapters of any start.

At B_0 = 0 a gradient does not depend on A, so every pair may have an A of its own at the cost of a projection. An
unknown A cannot be an input as it is; what the update holds exactly can be, G P_A = (s G A^T) (A A^T)^-1 A / s, in
coordinates that do not depend on A: L^T G P_A R (`Core`). `AgnosticPairs` puts it where other pairs have their updates,
so ridge, kernel ridge and the MLP fit to it unchanged; `view` does the same to the updates that are to be decoded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from r2f_ext.decoders.base import Updates
from r2f_ext.decoders.core import Core
from r2f_ext.errors import R2FError
from r2f_ext.pairs import PairSource, SimulatedPairs, StoredPairs, random_a
from r2f_ext.pairs.generate import project
from r2f_ext.types import PairBatch

SIZE = 48


class AgnosticPairs:
    """The gradients of `pairs`, each seen through an A of its own.

    Args:
        pairs: of one step of SGD from B = 0.
        seed: of the A's; another seed gives unseen ones.
        size: of the core.

    Raises:
        R2FError: the pairs' victims trained for steps, so that their gradients depend on A.
    """

    def __init__(self, pairs: PairSource, seed: int = 0, size: int = SIZE) -> None:
        if isinstance(pairs, SimulatedPairs) or (isinstance(pairs, StoredPairs) and "training" in pairs.manifest):
            raise R2FError(
                "the pairs are of victims that trained for steps: their gradients depend on A; use one-step pairs."
            )
        self.pairs, self.seed = pairs, seed
        self.target, self.a = pairs.target, pairs.a
        self.core = Core.of(pairs, len(pairs), size)

    def __len__(self) -> int:
        return len(self.pairs)

    def view(self, updates: Updates, a: dict[str, Tensor]) -> Updates:
        """Updates s G A^T [P, d_out, r] of adapters with A [r, d_in], or [P, r, d_in] -> L^T G P_A R [P, p, q]."""
        seen = {}
        for layer in self.target.layers:
            factor = a[layer.name].to(updates[layer.name])
            images = torch.linalg.solve(factor @ factor.mT, factor @ self.core.right[layer.name]) / layer.scale
            seen[layer.name] = (self.core.left[layer.name].mT @ updates[layer.name]) @ images
        return seen

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        first = start
        for batch in self.pairs.batches(start, stop):
            a = random_a(self.target, self.seed, first, len(batch.labels))
            updates = project(self.target, batch.gradients, a)
            yield PairBatch(self.view(updates, a), batch.gradients, batch.images, batch.labels)
            first += len(batch.labels)

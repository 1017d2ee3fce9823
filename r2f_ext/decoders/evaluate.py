"""Held-out cosine of decoders, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.pairs import PairSource
from r2f_ext.types import Gradient


@dataclass(frozen=True)
class HeldOut:
    """cosine[name] [n]: cosine of decoded and true gradient for n held-out pairs."""

    cosine: dict[str, Tensor]

    def summary(self) -> dict[str, dict[str, float]]:
        """name -> {cosine_mean, cosine_p05}."""
        return {
            name: {
                "cosine_mean": float(c.mean()),
                "cosine_p05": float(c.quantile(0.05)),
            }
            for name, c in self.cosine.items()
        }


def held_out_cosines(decoded: Gradient, pairs: PairSource, start: int, stop: int) -> HeldOut:
    """Compare decoded gradients [stop - start, d_out, d_in] with the true ones of the pairs `start` to `stop`.

    The decoder must not have been fitted to those pairs.
    """
    cosines: dict[str, list[Tensor]] = {name: [] for name in decoded.dense}
    first = 0
    for batch in pairs.batches(start, stop):
        last = first + len(batch.labels)
        for name, guess in decoded.dense.items():
            true = batch.gradients.dense(name).flatten(1)
            cosines[name].append(F.cosine_similarity(guess[first:last].flatten(1), true))
        first = last
    return HeldOut({name: torch.cat(parts) for name, parts in cosines.items()})

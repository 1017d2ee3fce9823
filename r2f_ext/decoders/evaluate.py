"""Accuracy of decoders on held-out pairs, per layer: direction (cosine) and norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.pairs import PairSource
from r2f_ext.types import Gradient


@dataclass(frozen=True)
class HeldOut:
    """For n held-out pairs: cosine[name] [n] of decoded and true gradient; norm[name] [n], |decoded| / |true|."""

    cosine: dict[str, Tensor]
    norm: dict[str, Tensor]

    def summary(self) -> dict[str, dict[str, float]]:
        """name -> {cosine_mean, cosine_p05, norm_error}; norm_error is the mean of ||decoded| / |true| - 1|."""
        return {
            name: {
                "cosine_mean": float(c.mean()),
                "cosine_p05": float(c.quantile(0.05)),
                "norm_error": float((self.norm[name] - 1).abs().mean()),
            }
            for name, c in self.cosine.items()
        }


def held_out_cosines(decoded: Gradient, pairs: PairSource, start: int, stop: int) -> HeldOut:
    """Compare decoded gradients [stop - start, d_out, d_in] with the true ones of the pairs `start` to `stop`.

    The decoder must not have been fitted to those pairs.
    """
    cosines: dict[str, list[Tensor]] = {name: [] for name in decoded.dense}
    norms: dict[str, list[Tensor]] = {name: [] for name in decoded.dense}
    first = 0
    for batch in pairs.batches(start, stop):
        last = first + len(batch.labels)
        for name, guess in decoded.dense.items():
            true, found = batch.gradients.dense(name).flatten(1), guess[first:last].flatten(1)
            cosines[name].append(F.cosine_similarity(found, true))
            norms[name].append(found.norm(dim=1) / true.norm(dim=1).clamp_min(1e-30))
        first = last
    return HeldOut(
        {name: torch.cat(parts) for name, parts in cosines.items()},
        {name: torch.cat(parts) for name, parts in norms.items()},
    )

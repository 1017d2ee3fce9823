"""Accuracy of decoders on held-out pairs, per layer: direction (cosine) and norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from r2f_ext.decoders.base import joined
from r2f_ext.pairs import PairSource
from r2f_ext.types import Gradient


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of one decoder in one layer on held-out pairs.

    Attributes:
        cosine_mean, cosine_p05: of decoded and true gradients: the mean, and the 5th percentile.
        norm_error: the mean of ||decoded| / |true| - 1|.
    """

    cosine_mean: float
    cosine_p05: float
    norm_error: float


@dataclass(frozen=True)
class HeldOut:
    """For n held-out pairs: cosine[name] [n] of decoded and true gradient; norm[name] [n], |decoded| / |true|."""

    cosine: dict[str, Tensor]
    norm: dict[str, Tensor]

    def summary(self) -> dict[str, Accuracy]:
        """The accuracy in each layer."""
        return {
            name: Accuracy(float(c.mean()), float(c.quantile(0.05)), float((self.norm[name] - 1).abs().mean()))
            for name, c in self.cosine.items()
        }


Guess = Callable[[str, slice], Tensor]
"""(layer, rows among the held-out pairs) -> the decoded gradients of these rows [n, d_out, d_in]."""


def held_out_cosines(decoded: Gradient, pairs: PairSource, start: int, stop: int) -> HeldOut:
    """Compare decoded gradients [stop - start, d_out, d_in] with the true ones of the pairs `start` to `stop`.

    The decoder must not have been fitted to those pairs.
    """
    return held_out_cosines_of_each({"": lambda name, rows: decoded.dense[name][rows]}, pairs, start, stop)[""]


def held_out_cosines_of_each(
    guesses: Mapping[str, Guess], pairs: PairSource, start: int, stop: int
) -> dict[str, HeldOut]:
    """The same for several decoders, each by its name, in one pass over the pairs.

    Besides what the guesses hold, only the true and decoded gradients of one layer and batch are in memory at a time.
    """
    cosines: dict[str, dict[str, list[Tensor]]] = {kind: defaultdict(list) for kind in guesses}
    norms: dict[str, dict[str, list[Tensor]]] = {kind: defaultdict(list) for kind in guesses}
    first = 0
    for batch in pairs.batches(start, stop):
        rows = slice(first, first + len(batch.labels))
        for name in pairs.target.names:
            true = batch.gradients.dense(name).flatten(1)
            for kind, guess in guesses.items():
                found = guess(name, rows).flatten(1)
                cosines[kind][name].append(F.cosine_similarity(found, true))
                norms[kind][name].append(found.norm(dim=1) / true.norm(dim=1).clamp_min(1e-30))
        first = rows.stop
    return {kind: HeldOut(joined(cosines[kind]), joined(norms[kind])) for kind in guesses}

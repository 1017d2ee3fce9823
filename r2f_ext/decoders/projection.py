"""G P_A, the part of the gradient that the update determines exactly: the untrained baseline of all decoders."""

from __future__ import annotations

import torch
from torch import Tensor

from r2f_ext.decoders.base import MatrixDecoder
from r2f_ext.pairs import PairSource
from r2f_ext.types import AdaptedLayer, PairBatch


def projection_matrix(layer: AdaptedLayer, a: Tensor) -> Tensor:
    """M [r, d_in] with (s G A^T) M = G P_A, in float64; P_A projects on A's row space (docs/methods.md, section 1)."""
    return torch.linalg.pinv(a.double()).mT / layer.scale


class Projection(MatrixDecoder):
    """G P_A = G A^+ A, from the update and A alone (docs/methods.md, section 1)."""

    kind = "projection"

    def start(self, pairs: PairSource, count: int) -> None:
        self.matrices = {
            layer.name: projection_matrix(layer, pairs.a[layer.name]).float() for layer in pairs.target.layers
        }

    def observe(self, batch: PairBatch) -> None:
        """Nothing is learned."""

    def finish(self) -> None:
        """Nothing is learned."""

"""Random projections of gradients to few numbers, taken from their factors: enough to choose a decoder's settings by.

G = D^T X is multiplied by two Gaussian matrices, L^T G R = (D L)^T (X R) [size, size]. Inner products and norms keep
their expectation (Johnson and Lindenstrauss 1984, on each side), so that the cosine of a prediction and the truth,
averaged over held-out pairs, can be estimated without one dense gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.decoders.base import layer_seed
from r2f_ext.types import FactoredGradient, Target

SIZE = 24


class Sketch:
    """name -> L [d_out, size] and R [d_in, size], drawn from the seed; a layer's do not depend on other layers."""

    def __init__(self, target: Target, size: int = SIZE, seed: int = 0) -> None:
        self.matrices = {}
        for layer in target.layers:
            generator = torch.Generator().manual_seed(layer_seed(seed, layer.name))
            self.matrices[layer.name] = tuple(
                (torch.randn(width, size, generator=generator) / size**0.5).to(target.base.device)
                for width in (layer.d_out, layer.d_in)
            )

    def __call__(self, gradients: FactoredGradient) -> dict[str, Tensor]:
        """P gradients -> name -> [P, size * size]."""
        seen = {}
        for name, (left, right) in self.matrices.items():
            x, delta = gradients.x[name], gradients.delta[name]
            seen[name] = ((delta @ left.to(delta.dtype)).mT @ (x @ right.to(x.dtype))).flatten(1)
        return seen


def mean_cosine(predicted: Tensor, true: Tensor) -> float:
    """Of the rows [n, k]."""
    return float(F.cosine_similarity(predicted, true).mean())

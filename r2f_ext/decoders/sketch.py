"""Random projections of gradients, computed from their factors, for choosing the settings of a decoder.

G = D^T X is multiplied by two Gaussian matrices, L^T G R = (D L)^T (X R) [SIZE, SIZE]. This preserves inner products
and squared norms in expectation (Johnson and Lindenstrauss 1984, applied to each side), so the mean cosine over
held-out pairs is estimated without a dense gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.files import seed_of
from r2f_ext.types import FactoredGradient, Target

SIZE = 24


class Sketch:
    """matrices[name]: L [d_out, SIZE] and R [d_in, SIZE], drawn from `seed`, independently of the other layers."""

    def __init__(self, target: Target, seed: int = 0) -> None:
        self.matrices = {}
        for layer in target.layers:
            generator = torch.Generator().manual_seed(seed_of(f"{seed}/{layer.name}"))
            self.matrices[layer.name] = tuple(
                (torch.randn(width, SIZE, generator=generator) / SIZE**0.5).to(target.base.device)
                for width in (layer.d_out, layer.d_in)
            )

    def __call__(self, gradients: FactoredGradient) -> dict[str, Tensor]:
        """P gradients -> name -> sketches [P, SIZE * SIZE]."""
        seen = {}
        for name, (left, right) in self.matrices.items():
            x, delta = gradients.x[name], gradients.delta[name]
            seen[name] = ((delta @ left.to(delta.dtype)).mT @ (x @ right.to(x.dtype))).flatten(1)
        return seen


def mean_cosine(predicted: Tensor, true: Tensor) -> float:
    """The mean over rows of the cosine between predicted [n, k] and true [n, k]."""
    return float(F.cosine_similarity(predicted, true).mean())

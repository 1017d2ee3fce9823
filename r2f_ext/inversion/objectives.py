"""What a candidate image is judged by: distances between its gradient and the observed one, and total variation."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from r2f_ext.pairs.generate import project
from r2f_ext.types import FactoredGradient, Gradient, Target

EPS = 1e-12


class Objective(Protocol):
    """A loss per victim, differentiable w.r.t. the candidate's gradient factors."""

    def __call__(self, candidate: FactoredGradient) -> Tensor:
        """Factors of V candidates -> loss [V]."""
        ...


class GradientCosine:
    """1 - cos between full gradients, averaged over layers (Geiping et al. 2020, Eq. 4, layer by layer).

    Uses the candidate's factors and never writes its gradient out (METHODS 8):
    <D^T X, G> = sum_n d_n^T G x_n and |D^T X|^2 = sum((D D^T) * (X X^T)).
    """

    def __init__(self, observed: Gradient) -> None:
        """observed: dense[name] [V, d_out, d_in], normalised here."""
        self.observed = {
            name: gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
            for name, gradient in observed.dense.items()
        }

    def __call__(self, candidate: FactoredGradient) -> Tensor:
        losses = []
        for name, observed in self.observed.items():
            x, delta = candidate.x[name], candidate.delta[name]
            # Deltas are tiny (loss gradients); scale them so that no square underflows in float32.
            delta = delta / delta.detach().flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
            inner = ((delta @ observed) * x).sum((1, 2))
            square = ((delta @ delta.mT) * (x @ x.mT)).sum((1, 2))
            losses.append(1 - inner / square.clamp_min(EPS).sqrt())
        return torch.stack(losses).mean(0)


class UpdateCosine:
    """1 - cos between LoRA updates s G A^T, averaged over layers: matching in the space that was observed."""

    def __init__(self, target: Target, a: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        """a[name] [r, d_in]; observed[name] [V, d_out, r], of any positive scale."""
        self.target, self.a = target, a
        self.observed = {
            name: u / u.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None] for name, u in observed.items()
        }

    def __call__(self, candidate: FactoredGradient) -> Tensor:
        losses = []
        for name, update in project(self.target, candidate, self.a).items():
            norm = update.flatten(1).norm(dim=1).clamp_min(1e-30)
            losses.append(1 - (update * self.observed[name]).sum((1, 2)) / norm)
        return torch.stack(losses).mean(0)


def total_variation(images: Tensor) -> Tensor:
    """Anisotropic total variation of [V, c, h, w], mean absolute difference of neighbours, [V]."""
    rows = (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 2, 3))
    columns = (images[..., :, 1:] - images[..., :, :-1]).abs().mean((1, 2, 3))
    return rows + columns

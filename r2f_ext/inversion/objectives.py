"""What a candidate image is judged by: distances between its gradient and the observed one, and total variation."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from r2f_ext.ops import factored_matching_loss, matching_loss, total_variation
from r2f_ext.pairs.generate import project
from r2f_ext.types import FactoredGradient, Gradient, Target

__all__ = ["GradientCosine", "Objective", "UpdateCosine", "total_variation"]


class Objective(Protocol):
    """A loss per victim, differentiable w.r.t. the candidate's gradient factors."""

    def __call__(self, candidate: FactoredGradient) -> Tensor:
        """Factors of V candidates -> loss [V]."""
        ...


class GradientCosine:
    """1 - cos between full gradients, averaged over layers (Geiping et al. 2020, Eq. 4, layer by layer).

    Uses the candidate's factors and never writes its gradient out (METHODS 8).
    """

    def __init__(self, observed: Gradient) -> None:
        """observed: dense[name] [V, d_out, d_in], of any positive scale."""
        self.observed = observed.dense

    def __call__(self, candidate: FactoredGradient) -> Tensor:
        names = list(self.observed)
        return factored_matching_loss(
            [candidate.x[name] for name in names],
            [candidate.delta[name] for name in names],
            [self.observed[name].to(candidate.x[name].dtype) for name in names],
        )


class UpdateCosine:
    """1 - cos between LoRA updates s G A^T, averaged over layers: matching in the space that was observed."""

    def __init__(self, target: Target, a: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        """a[name] [r, d_in]; observed[name] [V, d_out, r], of any positive scale."""
        self.target, self.a, self.observed = target, a, observed

    def __call__(self, candidate: FactoredGradient) -> Tensor:
        updates = project(self.target, candidate, self.a)
        observed = [self.observed[name].to(update.dtype) for name, update in updates.items()]
        return matching_loss(list(updates.values()), observed)

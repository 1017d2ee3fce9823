"""Objectives of gradient matching: the distance of a candidate's gradient, or of its LoRA update, from the observed
one, plus the total variation of its images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from r2f_ext.capture.project import project
from r2f_ext.errors import R2FError
from r2f_ext.ops import factored_matching_loss, matching_loss
from r2f_ext.types import FactoredGradient, Gradient, Target

Candidate = FactoredGradient | Gradient
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Distance:
    """How a candidate's gradients are compared with the observed ones; the arguments of `ops.matching_loss`.

    Attributes:
        kind: "layer_cosine", "cosine" or "l2".
        weights: one per layer, at least 0.
        tv_weight: weight of the images' total variation.
        isotropic: which total variation.
    """

    kind: str
    weights: list[float]
    tv_weight: float = 0.0
    isotropic: bool = False

    def of(self, candidate: list[Tensor], observed: list[Tensor], images: Tensor) -> Tensor:
        """Loss [T] of gradients [T, ...] and the images [T, c, h, w] that they come from."""
        return matching_loss(
            candidate,
            observed,
            images=images,
            weights=self.weights,
            kind=self.kind,
            tv_weight=self.tv_weight,
            isotropic=self.isotropic,
        )

    def of_factors(
        self,
        x: list[Tensor],
        delta: list[Tensor],
        observed: list[Tensor],
        images: Tensor,
    ) -> Tensor:
        """Loss [T] of gradients given as factors, see `ops.factored_matching_loss`."""
        return factored_matching_loss(
            x,
            delta,
            observed,
            images=images,
            weights=self.weights,
            kind=self.kind,
            tv_weight=self.tv_weight,
            isotropic=self.isotropic,
        )


class Objective(Protocol):
    """A loss for each trial, differentiable with respect to the candidate's gradient and its images.

    Attributes:
        shapes: layer (or parameter) -> shape of the gradient that was observed. A candidate must have these layers and
            may have more.
    """

    shapes: dict[str, Shape]

    def __call__(self, candidate: Candidate, images: Tensor, distance: Distance) -> Tensor:
        """Gradients of T trials and the images [T, c, h, w] that they come from -> loss [T].

        Args:
            distance: how the two are compared; its weights are in the order of `shapes`.
        """
        ...

    def norms(self) -> Tensor:
        """[V, L]: the norm of what was observed of V victims in each layer."""
        ...

    def repeat(self, restarts: int) -> Self:
        """The objective for trials of V victims, with `restarts` consecutive trials for each victim."""
        ...

    def tensors(self) -> list[Tensor]:
        """All observed tensors, for a fingerprint."""
        ...


class GradientObjective:
    """Distance between full gradients. On a CPU the gradient of a candidate given as factors is never formed.

    Args:
        observed: dense[name] [V, d_out, d_in] by layer, or factors, which are written out; or, to match gradients of
            any parameters of a whole classifier, dense[name] [V, *shape] by parameter name. For cosines at any positive
            scale.
    """

    def __init__(self, observed: Candidate) -> None:
        if isinstance(observed, Gradient):
            self.observed = observed.dense
        else:
            self.observed = {name: observed.dense(name) for name in observed.delta}
        self.shapes = {name: tuple(each.shape[1:]) for name, each in self.observed.items()}

    def __call__(self, candidate: Candidate, images: Tensor, distance: Distance) -> Tensor:
        if isinstance(candidate, Gradient):
            found = [candidate.dense[name] for name in self.shapes]
            return distance.of(found, _cast(self.observed, found[0].dtype), images)
        x, delta = [candidate.x[name] for name in self.shapes], [candidate.delta[name] for name in self.shapes]
        return distance.of_factors(x, delta, _cast(self.observed, x[0].dtype), images)

    def norms(self) -> Tensor:
        return _norms(self.observed)

    def repeat(self, restarts: int) -> GradientObjective:
        return GradientObjective(Gradient(_repeat(self.observed, restarts)))

    def tensors(self) -> list[Tensor]:
        return list(self.observed.values())


class UpdateObjective:
    """Distance between LoRA updates s G A^T: matching in the space that was observed.

    Args:
        a: name -> A [r, d_in].
        observed: name -> [V, d_out, r], for cosines at any positive scale. Layers of the target that are not in
            `observed` are ignored.

    Raises:
        R2FError: A and the observed update of a layer do not fit.
    """

    def __init__(self, target: Target, a: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        self.observed, self.a = observed, a
        layers = tuple(layer for layer in target.layers if layer.name in observed)
        self.target = Target(target.base, layers)
        self.shapes: dict[str, Shape] = {}
        for name, update in observed.items():
            if name not in a or update.shape[-1] != len(a[name]):
                raise R2FError(f"the observed update of {name} does not fit its A: pass both from one adapter.")
            self.shapes[name] = (update.shape[1], a[name].shape[1])

    def __call__(self, candidate: Candidate, images: Tensor, distance: Distance) -> Tensor:
        if isinstance(candidate, Gradient):
            found = {}
            for layer in self.target.layers:
                gradient = candidate.dense[layer.name]
                found[layer.name] = layer.scale * gradient @ self.a[layer.name].to(gradient.dtype).mT
        else:
            found = project(self.target, candidate, self.a)
        updates = [found[name] for name in self.shapes]
        return distance.of(updates, _cast(self.observed, updates[0].dtype), images)

    def norms(self) -> Tensor:
        return _norms(self.observed)

    def repeat(self, restarts: int) -> UpdateObjective:
        return UpdateObjective(self.target, self.a, _repeat(self.observed, restarts))

    def tensors(self) -> list[Tensor]:
        return [*self.observed.values(), *(self.a[name] for name in self.observed)]


def _cast(observed: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [each.to(dtype) for each in observed.values()]


def _norms(observed: dict[str, Tensor]) -> Tensor:
    """[V, L] of L tensors [V, ...]."""
    return torch.stack([each.flatten(1).double().norm(dim=1) for each in observed.values()], dim=1)


def _repeat(observed: dict[str, Tensor], restarts: int) -> dict[str, Tensor]:
    """[V, ...] -> [V * restarts, ...]; [1, ...] stays as it is and serves all trials."""
    return {name: t if len(t) == 1 else t.repeat_interleave(restarts, dim=0) for name, t in observed.items()}

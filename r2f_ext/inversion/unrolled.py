"""Updates of victims that took several steps, used batches or other optimizers, and their exact derivatives.

`UnrolledMap` takes the place of `update_map.UpdateMap`: the update after T training steps as a function of all images
that the victim owns. Its Jacobian is found in forward mode through every step: each step carries the factors, the
optimizer's buffers, and their tangents along a block of directions. The slopes of its misfit are found in reverse mode.

The learning rate of one plain SGD step cancels; here it does not, so the recipe must be known, and A_0 as well.

AdamW's first step is nearly the sign of the gradient, which `adamw_step` reads. From the second step on its movement
holds ratios of gradients, which are smooth except where an entry is near zero at all steps.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, grad_and_value, jvp, vmap

from r2f_ext.capture.hooks import ReplacedOutputs, as_tokens
from r2f_ext.errors import R2FError
from r2f_ext.graph_optimizer import Traced
from r2f_ext.inversion.adamw_step import EPS
from r2f_ext.inversion.newton import dense_jacobian
from r2f_ext.inversion.update_map import Subspace, unit_tangent, with_box_penalty
from r2f_ext.pairs import Training, simulate
from r2f_ext.types import BaseModel, Target

BETAS = (0.9, 0.999)  # torch.optim.AdamW's default, which `Training` keeps
TRUSTED_ROUNDINGS = 10.0
TINY_SQUARE = 1e-36  # far below EPS squared: keeps the derivative of a root at zero finite

State = dict[str, dict[str, Tensor]]  # "a", "b" and the optimizer's buffers -> name -> tensor
Norms = dict[str, dict[str, Tensor]]  # "b" and "a" -> name -> the norm of that part of z; A's unknown changes have none


class UnrolledMap:
    """z(x): the change of B, and of A in the layers of `a_weights`, by training on x; norm 1 per layer.

    For `gauss_newton.search`. A point concatenates all images of a victim, [training.owned * c * h * w] with
    labels [training.owned]. Training(batch=b) uses the same batch in every step; Training(steps=T, batch=b,
    samples=T * b) uses a different batch in each of T steps.

    Args:
        target: base model and adapted layers.
        a0: name -> A before the first step [r, d_in].
        shape: (c, h, w) of an image.
        training: the victim's recipe, learning rate included.
        directions: tangents per pass; memory grows with them.

    Raises:
        R2FError: training with dropout, whose random draws are unknown.
    """

    def __init__(
        self,
        target: Target,
        a0: dict[str, Tensor],
        shape: torch.Size | tuple[int, ...],
        training: Training,
        directions: int = 64,
    ) -> None:
        if training.dropout:
            raise R2FError("the search cannot follow a training with dropout: its random draws are unknown.")
        dtype = next(target.base.model.parameters()).dtype
        self.target, self.training, self.directions = target, training, directions
        self.a0 = {layer.name: a0[layer.name].to(dtype) for layer in target.layers}
        self.weights: dict[str, Tensor] = {}
        self.a_weights: dict[str, float] = {}
        self._norms = self._norms_by({})
        self.shape = torch.Size(shape)
        self._shape = (training.owned, *shape)
        self._others: dict[BaseModel, UnrolledMap] = {}
        self._steps = _Step(target, training)
        self._step, self._slopes = Traced(self._steps.along), Traced(self._slopes_of)

    def weighing(
        self, weights: dict[str, Tensor] | None = None, a_weights: dict[str, float] | None = None
    ) -> UnrolledMap:
        """The same map with weights for the precision of one victim's factors; traced graphs are shared.

        Args:
            weights: name -> factors [d_out, r] on B, see `FirstAdamWStep.weights`; None: 1.
            a_weights: name -> weight of A's change relative to B's, see `movement_weights`; None: A is ignored.
        """
        other = copy.copy(self)
        other.weights, other.a_weights = weights or {}, a_weights or {}
        other._norms = self._norms_by(other.a_weights)
        return other

    def on(self, base: BaseModel) -> UnrolledMap:
        """The same map for the images of another base with the same layers; made once, because tracing takes long."""
        if base not in self._others:
            target = replace(self.target, base=base)
            self._others[base] = UnrolledMap(target, self.a0, base.input_shape, self.training, self.directions)
        return self._others[base].weighing(self.weights, self.a_weights)

    def __call__(self, points: Tensor, labels: Tensor) -> Tensor:
        """Points [n, owned * c * h * w] in [0, 1], all of the labels [owned] -> [n, R]."""
        images = points.unflatten(1, self._shape)
        victims = simulate(self.target, self.a0, images, labels.expand(len(points), -1), self.training)
        return _units(self._parts_of(victims.a, victims.b))

    def together(self, batches: Tensor, label: Tensor) -> Tensor:
        """Batches [n, b, c * h * w] of one label [1], each the batch of every step -> [n, R]."""
        images = batches.unflatten(2, self._shape[1:])
        training = replace(self.training, batch=images.shape[1], samples=None)
        victims = simulate(self.target, self.a0, images, label.expand(images.shape[:2]), training)
        return _units(self._parts_of(victims.a, victims.b))

    def observation(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        """z of V adapters that were given: a[name] [V, r, d_in], b[name] [V, d_out, r] after the last step -> [V, R].

        Raises:
            R2FError: a part that did not move or is not finite.
        """
        parts = self._parts_of(a, b)
        for _, part in parts:
            if not torch.isfinite(part).all() or not part.any(dim=1).all():
                raise R2FError("a factor has not moved or is not finite: the adapter is untrained or damaged.")
        return _units(parts)

    def _parts_of(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """`_parts` of V adapters: a[name] [V, r, d_in], b[name] [V, d_out, r]."""
        return _parts(_changes(self.a0, a, b), self.weights, self._norms)

    def jacobian(self, point: Tensor, labels: Tensor, basis: Tensor) -> Tensor:
        """dz along the columns of basis [owned * c * h * w, q] at point [owned * c * h * w]: [q, R], exactly."""
        images = point.view(self._shape)
        return dense_jacobian(lambda rows: self._tangents(images, labels, rows), basis, self.directions, self._shape)

    def slopes(self, points: Tensor, labels: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Misfits [n] of points [n, owned * c * h * w], all of the labels [owned], and their slopes; see `UpdateMap`.

        Args:
            observed: [n, R].
        """
        slopes, misfits = self._slopes(points, labels, observed, self.a0, self.weights, self._norms)
        return with_box_penalty(points, misfits, slopes)

    def _slopes_of(
        self,
        points: Tensor,
        labels: Tensor,
        observed: Tensor,
        a0: dict[str, Tensor],
        weights: dict[str, Tensor],
        norms: Norms,
    ) -> tuple[Tensor, Tensor]:
        """The slopes [n, owned * c * h * w] of |z - observed|^2 / 2, and its values [n], by reverse mode."""

        def misfit(point: Tensor, observed: Tensor) -> Tensor:
            images, state = point.view(self._shape), _start(self.target, a0, self.training)
            for step, rate in enumerate(self.training.rates()):
                index = self.training.batch_of(step)
                state = self._steps.after(images[index], labels[index], state, _numbers(images, step, rate))
            a, b = ({name: each[None] for name, each in state[factor].items()} for factor in "ab")
            parts = _parts(_changes(a0, a, b), weights, norms)
            return (_units(parts)[0] - observed).square().sum() / 2

        return vmap(grad_and_value(misfit))(points, observed)

    def _norms_by(self, a_weights: dict[str, float]) -> Norms:
        """The norms of B's parts and of A's weighted ones; a layer's two have norm 1 together."""
        of_b = {name: (1 + a_weights.get(name, 0.0) ** 2) ** -0.5 for name in self.target.names}
        of_a = {name: (1 + a_weights[name] ** -2) ** -0.5 for name in self.target.names if name in a_weights}
        like = next(iter(self.a0.values()))
        return {f: {n: like.new_tensor(norm) for n, norm in each.items()} for f, each in (("b", of_b), ("a", of_a))}

    def along(self, images: Tensor, labels: Tensor, directions: Tensor) -> tuple[State, State]:
        """The state after training, and its derivatives along K directions.

        Args:
            images: [owned, c, h, w]; labels: [owned]; directions: [K, owned, c, h, w].

        Returns:
            (state, moved): state["a"][name] [r, d_in], state["b"][name] [d_out, r] and the optimizer's buffers; the
            same with [K, ...].
        """
        state = _start(self.target, self.a0, self.training)
        moved = {
            kind: {name: each.new_zeros(len(directions), *each.shape) for name, each in group.items()}
            for kind, group in state.items()
        }
        for step, rate in enumerate(self.training.rates()):
            index = self.training.batch_of(step)
            numbers = _numbers(images, step, rate)
            state, moved = self._step(images[index], labels[index], state, numbers, directions[:, index], moved)
        return state, moved

    def _tangents(self, images: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
        state, moved = self.along(images, labels, directions)
        a, b = ({name: each[None] for name, each in state[kind].items()} for kind in "ab")
        values = self._parts_of(a, b)
        tangents = _parts({kind: moved[kind] for kind in "ab"}, self.weights, self._norms)
        parts = zip(values, tangents, strict=True)
        return torch.cat([norm * unit_tangent(value[0], tangent) for (norm, value), (_, tangent) in parts], dim=1)


def _changes(a0: dict[str, Tensor], a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The changes of both factors by training."""
    return {"a": {name: each - a0[name] for name, each in a.items()}, "b": b}


def _parts(
    changes: dict[str, dict[str, Tensor]], weights: dict[str, Tensor], norms: Norms
) -> list[tuple[Tensor, Tensor]]:
    """The norm of each part of z, and its values [V, m] before they are scaled to it: of B, then of A."""
    of_b = [(norm, (changes["b"][name] * weights.get(name, 1.0)).flatten(1)) for name, norm in norms["b"].items()]
    return of_b + [(norm, changes["a"][name].flatten(1)) for name, norm in norms["a"].items()]


def _units(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """z [V, R] from its parts [V, m], each scaled to its norm."""
    return torch.cat([norm * F.normalize(part, dim=1, eps=1e-30) for norm, part in parts], dim=1)


def _numbers(like: Tensor, step: int, rate: float) -> Tensor:
    """What `_stepped` needs to know of a step: its size, and 1 - beta^t for AdamW's two averages."""
    return like.new_tensor([rate, *(1 - beta ** (step + 1) for beta in BETAS)])


def movement_weights(a0: dict[str, Tensor], a: dict[str, Tensor]) -> dict[str, float]:
    """Weight of A's change, from a0[name] to a[name] [r, d_in], relative to B's, for layers where A changed.

    B is precise to about ten roundings of itself. A's change is a difference, precise to one rounding of A.
    """
    ratios = {name: float((a[name] - each).norm() / each.norm()) for name, each in a0.items() if name in a}
    return {name: min(1.0, TRUSTED_ROUNDINGS * ratio) for name, ratio in ratios.items() if ratio > 0}


def _start(target: Target, a0: dict[str, Tensor], training: Training) -> State:
    """PEFT's start and the optimizer's zero buffers."""
    b0 = {layer.name: a0[layer.name].new_zeros(layer.d_out, layer.rank) for layer in target.layers}
    state = {"a": a0, "b": b0}
    if training.optimizer == "adamw":
        buffers = [f"{moment}_{factor}" for moment in ("mean", "square") for factor in "ab"]
    else:
        buffers = ["velocity_a", "velocity_b"] if training.momentum else []
    for buffer in buffers:
        state[buffer] = {name: torch.zeros_like(each) for name, each in state[buffer[-1]].items()}
    return state


class _Step:
    """One training step and its tangents."""

    def __init__(self, target: Target, training: Training) -> None:
        self.target, self.training = target, training
        modules = dict(target.base.model.named_modules())
        self._modules = {name: modules[name] for name in target.names}

    def along(
        self, images: Tensor, labels: Tensor, state: State, numbers: Tensor, directions: Tensor, moved: State
    ) -> tuple[State, State]:
        """images [b, c, h, w], labels [b], state, numbers [3], and the tangents of images and state, K of each."""

        def along(direction: Tensor, change: State) -> tuple[State, State]:
            step = lambda images, state: self.after(images, labels, state, numbers)  # noqa: E731
            return jvp(step, (images, state), (direction, change))  # type: ignore[return-value]

        value_once_and_all_tangents: Any = (None, 0)
        return vmap(along, out_dims=value_once_and_all_tangents)(directions, moved)

    def after(self, images: Tensor, labels: Tensor, state: State, numbers: Tensor) -> State:
        """The state after one more step."""

        def loss(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
            def adapted(name: str, x: Tensor, output: Tensor) -> Tensor:
                module, scale = self._modules[name], self.target.layer(name).scale
                added = scale * (as_tokens(module, x) @ a[name].mT) @ b[name].mT
                return output + (added.mT if isinstance(module, nn.Conv2d) else added).reshape(output.shape)

            with ReplacedOutputs(self._modules, adapted):
                logits = self.target.base.model(self.target.base.normalize(images))
            return F.cross_entropy(logits, labels)

        slopes = grad(loss, argnums=(0, 1))(state["a"], state["b"])
        after: State = {kind: {} for kind in state}
        for factor, slope in zip("ab", slopes, strict=True):
            for name in self.target.names:
                buffers = {kind[:-2]: group[name] for kind, group in state.items() if kind.endswith(f"_{factor}")}
                changed = _stepped(state[factor][name], slope[name], buffers, numbers, self.training)
                after[factor][name] = changed.pop("factor")
                for buffer, value in changed.items():
                    after[f"{buffer}_{factor}"][name] = value
        return after


def _stepped(
    factor: Tensor, slope: Tensor, buffers: dict[str, Tensor], numbers: Tensor, training: Training
) -> dict[str, Tensor]:
    """torch.optim's SGD or AdamW on one factor, written as a function; numbers: step size, and 1 - beta^t twice."""
    rate, unbiased_mean, unbiased_square = numbers.unbind()
    decay = training.weight_decay
    if training.optimizer == "adamw":
        mean = BETAS[0] * buffers["mean"] + (1 - BETAS[0]) * slope
        square = BETAS[1] * buffers["square"] + (1 - BETAS[1]) * slope.square()
        size = (square / unbiased_square).clamp_min(TINY_SQUARE).sqrt() + EPS
        return {
            "factor": factor * (1 - rate * decay) - rate * mean / unbiased_mean / size,
            "mean": mean,
            "square": square,
        }
    slope = slope + decay * factor if decay else slope
    if not buffers:
        return {"factor": factor - rate * slope}
    velocity = training.momentum * buffers["velocity"] + slope
    return {"factor": factor - rate * velocity, "velocity": velocity}


def side_by_side(subspace: Subspace, images: int) -> Subspace:
    """The subspace of `images` concatenated images, block-diagonal in that of one image."""
    return Subspace(torch.block_diag(*[subspace.basis] * images))

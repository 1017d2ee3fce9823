"""Gradients of candidate images, for all trials at once, and their derivative with respect to the images.

Two implementations of one interface: factors of the linear layers of a `Target` (transformers), and dense gradients of
any parameters of any classifier (convolutional nets). A trial is a group of b images whose gradients are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from r2f_ext.capture.hooks import Capture, ReplacedOutputs, as_tokens
from r2f_ext.errors import R2FError
from r2f_ext.inversion.objectives import Candidate, Shape
from r2f_ext.types import BaseModel, FactoredGradient, Gradient, Target

# Relative size of the weight perturbation in a central difference. Smaller ones increase the rounding error.
RELATIVE_MOVE = {torch.float32: 1e-3, torch.float64: 1e-5}


class Candidates(Protocol):
    """Gradients of T trials, images [T, b, c, h, w] in [0, 1] and labels [T, b].

    Attributes:
        shapes: layer (or parameter) -> shape of its gradient.
    """

    shapes: dict[str, Shape]

    def __call__(self, images: Tensor, labels: Tensor, create_graph: bool = False) -> Candidate:
        """The gradients. With `create_graph` they can be differentiated with respect to `images`."""
        ...

    def slope_along(self, images: Tensor, labels: Tensor, direction: dict[str, Tensor]) -> Tensor:
        """d/d images of <direction_t, g_t(images)> for every trial, with the directions [T, *shape] held fixed.

        A central difference of two first-order passes at weights perturbed along the direction, both in one batch: no
        layer needs a second derivative. The error is of second order in the perturbation. Where the gradient is
        discontinuous (ReLU), the result is the slope of a smoothed function.
        """
        ...


def candidates_of(model: Target | BaseModel, names: Iterable[str]) -> Candidates:
    """Factors for a target's layers, dense gradients for a classifier's parameters.

    Raises:
        R2FError: no such layer or parameter, or a classifier in training mode.
    """
    if isinstance(model, Target):
        return LayerGradients(model, list(names))
    return ParameterGradients(model, list(names))


class LayerGradients:
    """Factors of the Linear layers and patchifying convolutions `names` of a target, through `Capture`."""

    def __init__(self, target: Target, names: list[str]) -> None:
        absent = [name for name in names if name not in target.names]
        if absent:
            raise R2FError(f"{absent[0]} was observed, but is no layer of the target: pass its own base.")
        self.target = Target(target.base, tuple(layer for layer in target.layers if layer.name in names))
        self.shapes: dict[str, Shape] = {layer.name: (layer.d_out, layer.d_in) for layer in self.target.layers}

    def __call__(self, images: Tensor, labels: Tensor, create_graph: bool = False) -> FactoredGradient:
        with Capture(self.target) as capture:
            return capture(images, labels, create_graph=create_graph)

    def slope_along(self, images: Tensor, labels: Tensor, direction: dict[str, Tensor]) -> Tensor:
        base = self.target.base
        modules = {name: base.model.get_submodule(name) for name in self.shapes}
        move = _move(direction, [base.model.get_parameter(f"{name}.weight") for name in modules])
        changes = {name: by_trial(move, direction[name]) for name in modules}

        def moved(name: str, x: Tensor, output: Tensor) -> Tensor:
            """Adds the effect of each trial's change of the weights, forwards and backwards, to a layer's output."""
            change, tokens = torch.cat([changes[name], -changes[name]]), as_tokens(modules[name], x)
            extra = tokens.reshape(len(change), -1, tokens.shape[-1]) @ change.mT
            extra = extra.reshape(len(output), -1, change.shape[1])
            return output + (extra.mT if isinstance(modules[name], nn.Conv2d) else extra).reshape(output.shape)

        with ReplacedOutputs(modules, moved):
            difference = _difference(lambda inputs: base.model(inputs.flatten(0, 1)), base, images, labels)
        return by_trial(0.5 / move, difference)


class ParameterGradients:
    """Dense gradients of the parameters `names` of any classifier in eval mode.

    Each trial has its own copy of the parameters, so that one backward gives every trial's gradient: `vmap` turns T
    convolutions into one grouped convolution and T linear layers into one batched product.
    """

    def __init__(self, base: BaseModel, names: list[str]) -> None:
        known = dict(base.model.named_parameters())
        absent = [name for name in names if name not in known]
        if absent:
            raise R2FError(f"base '{base.spec}' has no parameter {absent[0]}: its gradient cannot be matched.")
        if any(module.training for module in base.model.modules()):
            raise R2FError(f"base '{base.spec}' is in training mode, which mixes trials: call its eval() first.")
        self.base = base
        self.parameters = {name: known[name].detach() for name in names}
        self.shapes: dict[str, Shape] = {name: tuple(p.shape) for name, p in self.parameters.items()}

    def __call__(self, images: Tensor, labels: Tensor, create_graph: bool = False) -> Gradient:
        trials = len(images)
        own = {name: p.expand(trials, *p.shape).detach().requires_grad_() for name, p in self.parameters.items()}
        with torch.enable_grad():
            logits = self._logits(self.base.normalize(images), own)
            loss = _summed_loss(logits, labels)
            grads = torch.autograd.grad(loss, list(own.values()), create_graph=create_graph)
        return Gradient(dict(zip(own, grads, strict=True)))

    def slope_along(self, images: Tensor, labels: Tensor, direction: dict[str, Tensor]) -> Tensor:
        move = _move(direction, list(self.parameters.values()))
        own = {}
        for name, parameter in self.parameters.items():
            step = by_trial(move, direction[name])
            own[name] = torch.cat([parameter + step, parameter - step])
        difference = _difference(lambda inputs: self._logits(inputs, own), self.base, images, labels)
        return by_trial(0.5 / move, difference)

    def _logits(self, inputs: Tensor, own: dict[str, Tensor]) -> Tensor:
        """Inputs [T, b, c, h, w], parameters [T, *shape] -> logits [T, b, classes]."""
        if len(inputs) == 1:
            return functional_call(self.base.model, {name: p[0] for name, p in own.items()}, (inputs[0],))[None]
        logits: Tensor = vmap(lambda parameters, x: functional_call(self.base.model, parameters, (x,)))(own, inputs)
        return logits


def _summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, averaged over a trial's images and summed over the (independent) trials."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum") / labels.shape[1]


def _difference(model: Callable[[Tensor], Tensor], base: BaseModel, images: Tensor, labels: Tensor) -> Tensor:
    """d loss / d images at the first half of the model's trials minus that at the second half."""
    both = torch.cat([images, images]).detach().requires_grad_()
    twice = torch.cat([labels, labels])
    with torch.enable_grad():
        inputs = base.normalize(both)
        (slope,) = torch.autograd.grad(_summed_loss(model(inputs), twice), [both])
    plus, minus = slope.chunk(2)
    return plus - minus


def _move(direction: dict[str, Tensor], weights: list[Tensor]) -> Tensor:
    """[T]: the length of each trial's perturbation along its direction."""
    size = torch.stack([w.detach().double().square().sum() for w in weights]).sum().sqrt()
    length = torch.stack([d.double().flatten(1).square().sum(1) for d in direction.values()]).sum(0).sqrt()
    move = RELATIVE_MOVE[weights[0].dtype] * size / length.clamp_min(torch.finfo(torch.float32).tiny)
    return move.to(weights[0].dtype)


def by_trial(numbers: Tensor, tensor: Tensor) -> Tensor:
    """Numbers [T] times a tensor [T, ...]."""
    return numbers.view(-1, *[1] * (tensor.ndim - 1)) * tensor

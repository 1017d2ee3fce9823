"""The decoders' operators in plain PyTorch: what `reference.py` is for the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_add_weighted_gradients, check_perceptrons
from .schemas import NAMESPACE


def perceptrons(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], with_saved: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """One decoder after another: linear layers with the exact GELU between them (Hendrycks and Gimpel 2016)."""
    check_perceptrons(inputs, weights, biases)
    depth = len(weights) // len(inputs)
    outputs, saved = [], []
    for i, values in enumerate(inputs):
        for j in range(i * depth, (i + 1) * depth):
            if j > i * depth:
                saved.append(values)
                values = F.gelu(values)
            values = F.linear(values, weights[j], biases[j])
        outputs.append(values)
    return outputs, saved if with_saved else []


def perceptrons_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs_inputs: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The chain rule, from the last linear layer to the first."""
    depth = len(weights) // len(inputs)
    grad_inputs, grad_weights, grad_biases = [], list(weights), list(weights)
    for i, grad in enumerate(grads):
        pre_activations = saved[i * (depth - 1) : (i + 1) * (depth - 1)]
        for j in reversed(range(depth)):
            values = F.gelu(pre_activations[j - 1]) if j > 0 else inputs[i]
            grad_weights[i * depth + j] = grad.mT @ values
            grad_biases[i * depth + j] = grad.sum(0)
            if j > 0 or needs_inputs:
                grad = grad @ weights[i * depth + j]
            if j > 0:
                grad = torch.ops.aten.gelu_backward(grad, pre_activations[j - 1])
        if needs_inputs:
            grad_inputs.append(grad)
    return grad_inputs, grad_weights, grad_biases


def add_weighted_gradients_(
    totals: Sequence[Tensor], weights: Sequence[Tensor], x: Sequence[Tensor], delta: Sequence[Tensor]
) -> None:
    """All gradients of a layer written out, then added up."""
    check_add_weighted_gradients(totals, weights, x, delta)
    for total, w, x_l, delta_l in zip(totals, weights, x, delta, strict=True):
        gradients = delta_l.to(total.dtype).mT @ x_l.to(total.dtype)
        total += torch.einsum("vp,pij->vij", w, gradients)


for _function in (perceptrons, perceptrons_backward, add_weighted_gradients_):
    torch.library.impl(f"{NAMESPACE}::{_function.__name__}", "default", _function)

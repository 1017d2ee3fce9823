"""The decoders' operators in plain PyTorch: what `reference.py` is for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_decode
from .reference import accumulation_dtype
from .schemas import NAMESPACE

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "identity": lambda values: values}
"""gelu is the exact one, v Phi(v) (Hendrycks and Gimpel, 2016)."""


def _derivative(activation: str, values: Tensor) -> Tensor | None:
    """Of the activation at its argument; None for 1."""
    if activation == "identity":
        return None
    if activation == "relu":
        return (values > 0).to(values.dtype)
    density = torch.exp(-0.5 * values.square()) * (2 * torch.pi) ** -0.5
    return 0.5 * (1 + torch.erf(values * 0.5**0.5)) + values * density


@dataclass
class _Layer:
    """One layer's decoder, in the accumulation type. The vectors of `kept`:

    norm                [b], with `normalize` only
    before              of each hidden map what its activation is given, [b, width]
    coefficients        [b, k], with a basis only: not yet times the norm
    """

    input: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    basis: Tensor | None
    kept_shapes: list[tuple[int, ...]]


def _layers(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bases: Sequence[Tensor],
    normalize: bool,
) -> Iterator[_Layer]:
    dtype = accumulation_dtype(inputs[0].dtype)
    maps = len(weights) // len(inputs)
    for i, given in enumerate(inputs):
        of_layer = slice(i * maps, (i + 1) * maps)
        shapes: list[tuple[int, ...]] = [(len(given),)] if normalize else []
        shapes += [(len(given), len(w)) for w in weights[of_layer][: maps if bases else maps - 1]]
        yield _Layer(
            given.to(dtype),
            [w.to(dtype) for w in weights[of_layer]],
            [b.to(dtype) for b in biases[of_layer]] if biases else [None] * maps,
            bases[i].to(dtype) if bases else None,
            shapes,
        )


def kept_size(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bases: Sequence[Tensor],
    normalize: bool,
) -> int:
    """Elements of `kept`."""
    maps = len(weights) // len(inputs)
    widths = [w.shape[0] for j, w in enumerate(weights) if bases or j % maps < maps - 1]
    return inputs[0].shape[0] * (sum(widths) + (len(inputs) if normalize else 0))


def decode(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bases: Sequence[Tensor],
    activation: str,
    normalize: bool,
) -> tuple[list[Tensor], Tensor]:
    """act(W h + bias) map by map, the last one without act, then c basis; normalized: |z| f(z / |z|)."""
    check_decode(inputs, weights, biases, bases, activation)
    outputs, kept = [], []
    for layer in _layers(inputs, weights, biases, bases, normalize):
        h, norm = layer.input, None
        if normalize:
            norm = _norm(h)
            kept.append(norm)
            h = h * _one_over(norm)[:, None]
        for j, (weight, bias) in enumerate(zip(layer.weights, layer.biases, strict=True)):
            h = F.linear(h, weight, bias)
            last = j + 1 == len(layer.weights)
            if not last or layer.basis is not None:
                kept.append(h)
            h = h if last else ACTIVATIONS[activation](h)
        h = h if norm is None else h * norm[:, None]
        outputs.append(h if layer.basis is None else h @ layer.basis)
    flat = torch.cat([k.flatten() for k in kept]) if kept else outputs[0].new_empty(0)
    return outputs, flat


def _norm(rows: Tensor) -> Tensor:
    """In float64: squares of small numbers would underflow."""
    return rows.double().square().sum(1).sqrt().to(rows.dtype)


def _one_over(norm: Tensor) -> Tensor:
    """The direction of nothing is nothing."""
    return torch.where(norm == 0, 0.0, 1 / torch.where(norm == 0, 1.0, norm))


def decode_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bases: Sequence[Tensor],
    kept: Tensor,
    activation: str,
    normalize: bool,
    to_inputs: bool,
    to_weights: bool,
    to_bases: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The chain rule, from the last map to the first."""
    grad_inputs: list[Tensor] = []
    grad_weights: list[Tensor] = []
    grad_biases: list[Tensor] = []
    grad_bases: list[Tensor] = []
    at = 0
    for grad, layer in zip(grads, _layers(inputs, weights, biases, bases, normalize), strict=True):
        saved = []
        for shape in layer.kept_shapes:
            size = torch.Size(shape).numel()
            saved.append(kept[at : at + size].view(shape))
            at += size
        norm = saved.pop(0)[:, None] if normalize else None
        coefficients = saved.pop() if layer.basis is not None else None
        one_over = None if norm is None else _one_over(norm)
        first = layer.input if one_over is None else layer.input * one_over
        act = ACTIVATIONS[activation]
        hidden = [first, *(act(before) for before in saved)]

        g = grad.to(kept.dtype)
        if layer.basis is not None:
            assert coefficients is not None
            if to_bases:
                scaled = coefficients if norm is None else coefficients * norm
                grad_bases.append(scaled.mT @ g)
            g = g @ layer.basis.mT
        to_norm = None
        if norm is not None:
            result = (
                coefficients if coefficients is not None else F.linear(hidden[-1], layer.weights[-1], layer.biases[-1])
            )
            to_norm, g = (g * result).sum(1, keepdim=True), g * norm
        to_w, to_b = [], []
        for j in reversed(range(len(layer.weights))):
            if to_weights:
                to_w.append(g.mT @ hidden[j])
                to_b.append(g.sum(0))
            if j > 0 or to_inputs:
                g = g @ layer.weights[j]
            if j > 0 and (slope := _derivative(activation, saved[j - 1])) is not None:
                g = g * slope
        if to_inputs:
            if one_over is not None and to_norm is not None:
                g = (g - first * (g * first).sum(1, keepdim=True)) * one_over + first * to_norm
            grad_inputs.append(g)
        grad_weights += reversed(to_w)
        grad_biases += reversed(to_b) if biases else []
    return grad_inputs, grad_weights, grad_biases, grad_bases


def decoder_sums(
    coefficients: Sequence[Tensor], bases: Sequence[Tensor], x: Sequence[Tensor], delta: Sequence[Tensor]
) -> Tensor:
    """[L, b, 3]: <c basis, delta^T x>, |c basis|^2, |delta^T x|^2. Written out here, and in float64."""
    layers = []
    for c, basis, x_l, d in zip(coefficients, bases, x, delta, strict=True):
        decoded, true = c.double() @ basis.double(), _true(x_l, d).double()
        layers.append(torch.stack([(decoded * true).sum(1), decoded.square().sum(1), true.square().sum(1)], dim=-1))
    return torch.stack(layers)


def _true(x: Tensor, delta: Tensor) -> Tensor:
    return (delta.double().mT @ x.double()).flatten(1)


def decoder_sums_backward(
    grad_sums: Tensor,
    coefficients: Sequence[Tensor],
    bases: Sequence[Tensor],
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    to_bases: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """With g the gradient of the sums, dL/d(c basis) = g_0 true + 2 g_1 decoded."""
    grad_coefficients, grad_bases = [], []
    dtype = accumulation_dtype(coefficients[0].dtype)
    for c, basis, x_l, d, g in zip(coefficients, bases, x, delta, grad_sums.double(), strict=True):
        wide, wide_basis = c.double(), basis.double()
        to_decoded = g[:, 0:1] * _true(x_l, d) + 2 * g[:, 1:2] * (wide @ wide_basis)
        grad_coefficients.append((to_decoded @ wide_basis.mT).to(dtype))
        if to_bases:
            grad_bases.append((wide.mT @ to_decoded).to(dtype))
    return grad_coefficients, grad_bases


for _function in (decode, decode_backward, decoder_sums, decoder_sums_backward):
    torch.library.impl(f"{NAMESPACE}::{_function.__name__}", "default", _function)

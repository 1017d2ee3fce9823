"""`decode`: the decoders of all layers in one call, from updates to gradients or their coefficients in a basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import DTYPES
from .decoder_reference import ACTIVATIONS, kept_size
from .reference import accumulation_dtype
from .schemas import NAMESPACE

MAX_HIDDEN = 4

Layers = Sequence[Tensor] | Tensor
"""One tensor for each of L layers, or all in one with a leading dimension L (taken apart into views, not copied)."""


def decode(
    inputs: Layers,
    weights: Sequence[Layers],
    biases: Sequence[Layers] | None = None,
    bases: Layers | None = None,
    *,
    activation: str = "gelu",
    normalize: bool = False,
) -> list[Tensor]:
    """Every layer's decoder on its own batch: a linear map or an MLP, and a low-rank basis head.

    For each layer, with H = len(weights) - 1 hidden maps:

        h = z            h = act(W_j h + bias_j) for j < H            c = W_H h + bias_H            decoded = c basis

    Without bases c is the result. With `normalize` a decoder f becomes |z| f(z / |z|), so that decode(s z) =
    s decode(z) for s > 0; where z = 0 the result and its derivative are 0.

    Shapes (layers l of any sizes; all have the same H and the same batch b):
        inputs   L tensors [b, n_l], or one [L, b, n]
        weights  H + 1 times L tensors [out, in], or one [L, out, in]: weights[j][l] is map j of layer l; H is 0 to 4
        biases   H + 1 times L tensors [out], or one [L, out]; None: no biases at all
        bases    L tensors [k_l, m_l], or one [L, k, m], or None; m = d_out d_in of a flattened gradient
        returns  L tensors [b, m_l] (without bases [b, out] of the last map)

    activation: "gelu" (exact, by erf), "relu" or "identity".

    All share one dtype: float32, float64 or bfloat16. Sums, hidden values and results are float32 (float64 for
    float64). Any strides. Deterministic. Differentiable once in all tensors; gradients of tensors that do not require
    them are not computed.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, unknown activation, several devices.
        TypeError: dtypes that are not supported or differ from each other.
    """
    z, count = list(inputs), len(inputs)
    W = [list(each) for each in weights]
    bias = [list(each) for each in biases or ()]
    head = [] if bases is None else list(bases)
    _check(z, W, bias, head, activation)
    counts = (count, len(W), len(bias), len(head))
    per_layer = [tensor for maps in (W, bias) for of_layer in zip(*maps, strict=True) for tensor in of_layer]
    return list(_Decode.apply(counts, activation, normalize, *z, *per_layer, *head))


def _check(
    z: list[Tensor], W: list[list[Tensor]], bias: list[list[Tensor]], head: list[Tensor], activation: str
) -> None:
    """Runs on every call, so it touches each shape once."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"decode: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if not 1 <= len(W) <= MAX_HIDDEN + 1 or len(bias) not in (0, len(W)):
        raise ValueError(
            f"decode: weights must have 1 to {MAX_HIDDEN + 1} maps, and biases as many; got {len(W)} and {len(bias)}"
        )
    count = len(z)
    if not z or any(len(each) != count for each in (*W, *bias)) or len(head) not in (0, count):
        raise ValueError(
            "decode: inputs, each of weights and biases, and bases must have the same number of layers, at least 1: "
            + ", ".join(str(len(each)) for each in (z, *W, *bias, *([head] if head else [])))
        )
    dtype, device = z[0].dtype, z[0].device
    if dtype not in DTYPES:
        raise TypeError(f"decode: inputs must be float32, float64 or bfloat16; got {dtype}")
    batch = z[0].shape[:1]
    for layer in range(count):
        shape = z[layer].shape
        if len(shape) != 2 or shape[:1] != batch:
            raise ValueError(f"decode: inputs must be [b, n] with one b; layer {layer} has {list(shape)}")
        width = shape[1]
        tensors = [z[layer]]
        for j, each in enumerate(W):
            weight = each[layer]
            if weight.ndim != 2 or weight.shape[1] != width:
                raise ValueError(f"decode: weights[{j}][{layer}] must be [out, {width}]; got {list(weight.shape)}")
            width = weight.shape[0]
            tensors.append(weight)
            if bias:
                if bias[j][layer].shape != (width,):
                    raise ValueError(
                        f"decode: biases[{j}][{layer}] must be [{width}]; got {list(bias[j][layer].shape)}"
                    )
                tensors.append(bias[j][layer])
        if head:
            if head[layer].ndim != 2 or head[layer].shape[0] != width:
                raise ValueError(f"decode: bases[{layer}] must be [{width}, m]; got {list(head[layer].shape)}")
            tensors.append(head[layer])
        for tensor in tensors:
            if tensor.dtype != dtype:
                raise TypeError(
                    f"decode: all tensors must share one dtype; layer {layer} has {tensor.dtype}, not {dtype}"
                )
            if tensor.device != device:
                raise ValueError(
                    f"decode: all tensors must be on one device; layer {layer} has {tensor.device}, not {device}"
                )


class _Decode(torch.autograd.Function):
    """A Function around the raw operators: for lists of tensors `register_autograd` costs twice the time a call."""

    @staticmethod
    def forward(
        ctx: Any, counts: tuple[int, int, int, int], activation: str, normalize: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.counts, ctx.settings = counts, (activation, normalize)
        outputs, kept = torch.ops.r2f.decode.default(*_split(counts, tensors), activation, normalize)
        ctx.save_for_backward(*tensors, kept)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *tensors, kept = ctx.saved_tensors
        lists = _split(ctx.counts, tensors)
        wanted = [any(each) for each in _split(ctx.counts, ctx.needs_input_grad[3:])]
        wanted[1] = wanted[1] or wanted[2]  # weights and biases come together
        gradients = torch.ops.r2f.decode_backward.default(
            list(grads), *lists, kept, *ctx.settings, wanted[0], wanted[1], wanted[3]
        )
        result: list[Tensor | None] = [None, None, None]
        for given, computed in zip(lists, gradients, strict=True):
            result += [g.to(t.dtype) for g, t in zip(computed, given, strict=True)] if computed else [None] * len(given)
        return tuple(result)


def _split(counts: tuple[int, int, int, int], flat: Sequence[Any]) -> list[list[Any]]:
    """inputs, weights, biases, bases."""
    layers, maps, biased, heads = counts
    lists, at = [], 0
    for size in (layers, layers * maps, layers * biased, heads):
        lists.append(list(flat[at : at + size]))
        at += size
    return lists


@torch.library.register_fake(f"{NAMESPACE}::decode")
def _fake(
    inputs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    bases: list[Tensor],
    activation: str,
    normalize: bool,
) -> tuple[list[Tensor], Tensor]:
    dtype, maps = accumulation_dtype(inputs[0].dtype), len(weights) // len(inputs)
    widths = [t.shape[1] for t in bases] or [t.shape[0] for t in weights[maps - 1 :: maps]]
    outputs = [z.new_empty((z.shape[0], width), dtype=dtype) for z, width in zip(inputs, widths, strict=True)]
    return outputs, inputs[0].new_empty(kept_size(inputs, weights, biases, bases, normalize), dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::decode_backward")
def _fake_backward(
    grads: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    bases: list[Tensor],
    kept: Tensor,
    activation: str,
    normalize: bool,
    to_inputs: bool,
    to_weights: bool,
    to_bases: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    def like(tensors: list[Tensor], wanted: bool) -> list[Tensor]:
        return [t.new_empty(t.shape, dtype=kept.dtype) for t in tensors] if wanted else []

    return like(inputs, to_inputs), like(weights, to_weights), like(biases, to_weights), like(bases, to_bases)

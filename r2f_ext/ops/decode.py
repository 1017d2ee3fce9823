"""`decode`: the decoders of all layers in one call, from updates to gradients or their coefficients in a basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_decode
from .decoder_reference import kept_size
from .gradients import needs_gradient
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
    float64). In bfloat16, batches of more than 8 and the gradients are matrix products of the library in bfloat16,
    whose factors and results are rounded to it: fast where the processor has them, and meant for training. Any strides.
    Deterministic. Differentiable once in all tensors; gradients of tensors that do not require them are not computed.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, unknown activation, several devices.
        TypeError: dtypes that are not supported or differ from each other.
    """
    z, head, count = list(inputs), [] if bases is None else list(bases), len(inputs)
    maps, of_maps = len(weights), len(biases or ())
    if not 1 <= maps <= MAX_HIDDEN + 1 or of_maps not in (0, maps):
        raise ValueError(
            f"decode: weights must have 1 to {MAX_HIDDEN + 1} maps, and biases as many; got {maps} and {of_maps}"
        )
    if not z or any(len(each) != count for each in (*weights, *(biases or ()))) or len(head) not in (0, count):
        raise ValueError(
            "decode: inputs, each of weights and biases, and bases must have the same number of layers, at least 1: "
            + ", ".join(str(len(each)) for each in (z, *weights, *(biases or ()), *([head] if head else [])))
        )
    W, bias = ([t for layer in zip(*each, strict=True) for t in layer] for each in (weights, biases or ()))
    try:
        if needs_gradient(*z, *W, *bias, *head):
            return list(
                _Decode.apply((count, len(W), len(bias), len(head)), activation, normalize, *z, *W, *bias, *head)
            )
        outputs: list[Tensor] = torch.ops.r2f.decode.default(z, W, bias, head, activation, normalize)[0]
    except Exception:
        check_decode(z, W, bias, head, activation)  # says which argument is wrong and how
        raise
    return outputs


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
    lists, at = [], 0
    for size in counts:
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
    check_decode(inputs, weights, biases, bases, activation)
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

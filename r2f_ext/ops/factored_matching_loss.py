"""`factored_matching_loss`: `matching_loss` for gradients that are given as factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import check_factored_matching_loss
from .matching_loss import cast_like, check_constant, check_kind, empty_gradients, normalized_weights
from .reference import accumulation_dtype
from .schemas import NAMESPACE


def factored_matching_loss(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    observed: Sequence[Tensor],
    *,
    images: Tensor,
    weights: Sequence[float] | None = None,
    kind: str = "layer_cosine",
    tv_weight: float = 0.0,
    isotropic: bool = False,
) -> Tensor:
    """`matching_loss` of the gradients G_l = delta_l^T x_l [T, d_out, d_in], which need not exist all at once: [T].

    On CUDA the gradients are written out, at most 2^27 elements (512 MiB in float32) or one layer at a time, because
    that is faster there. On the CPU they are never formed. With G* the observed gradient of a layer:

        <G, G*> = sum_n delta_n^T G* x_n
        |G|^2   = sum (delta delta^T) o (x x^T), at least 0

    Kinds, weights, images and total variation are those of `matching_loss`. On the CPU, `l2` computes |G - G*|^2 from
    these three numbers: below about 1e-6 (|G|^2 + |G*|^2) in float32 (1e-14 in float64) the result is only rounding
    error.

    Shapes (L layers, N tokens):
        x         L tensors [T, N, d_in]
        delta     L tensors [T, N, d_out]
        observed  L tensors [T, d_out, d_in], or 1 in place of T
        images    [T, c, h, w]
        weights   L numbers >= 0, not all zero; None: all equal

    All but images share one dtype: float32, float64 or bfloat16; images have any of these. Products are computed in
    float32 (float64 for float64), scaled so that squares of deltas (on CUDA, of entries of G) from 1e-28 to 1e9 are in
    range; sums over layers in float64. The loss is float32 (float64 for float64). Any strides. Deterministic.

    Differentiable in x, delta and images; observed is a constant. The second derivative goes through ordinary PyTorch
    operators.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, unknown kind, bad weights, several devices; in
            the backward, if observed requires a gradient.
        TypeError: dtypes that are not supported or differ from each other.
    """
    try:
        loss: Tensor = torch.ops.r2f.factored_matching_loss.default(
            x,
            delta,
            observed,
            normalized_weights(len(x), weights),
            check_kind(kind),
            images,
            tv_weight,
            isotropic,
        )[0]
    except Exception:
        check_factored_matching_loss(x, delta, observed, images)  # raises an error that names the argument
        raise
    return loss


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, delta, observed, weights, kind, images, *settings = inputs
    _, sums, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, saved)
    ctx.save_for_backward(*x, *delta, *observed, images, sums, saved)
    ctx.weights, ctx.kind, ctx.settings = weights, kind, settings


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    count = len(ctx.needs_input_grad[0])
    to_x: list[Tensor | None] = [None] * count
    to_delta: list[Tensor | None] = [None] * count
    to_images = None
    check_constant("factored_matching_loss", ctx.needs_input_grad[2])
    if grad_loss is not None:
        *tensors, images, sums, saved = ctx.saved_tensors
        x, delta, observed = (tensors[k * count : (k + 1) * count] for k in range(3))
        if torch.is_grad_enabled():  # differentiable operators, so that the gradient has a graph
            backward = reference.factored_matching_loss_backward
            sums = reference.factored_sums(x, delta, observed)
        else:
            backward = torch.ops.r2f.factored_matching_loss_backward.default
        grad_x, grad_delta, grad_images = backward(
            grad_loss, x, delta, observed, sums, saved, ctx.weights, ctx.kind, images, *ctx.settings
        )
        to_x, to_delta = list(cast_like(grad_x, x)), list(cast_like(grad_delta, delta))
        to_images = grad_images.to(images.dtype) if ctx.needs_input_grad[5] else None
    return to_x, to_delta, [None] * count, None, None, to_images, None, None


torch.library.register_autograd(f"{NAMESPACE}::factored_matching_loss", _backward, setup_context=_setup_context)


@torch.library.register_fake(f"{NAMESPACE}::factored_matching_loss")
def _fake(
    x: list[Tensor],
    delta: list[Tensor],
    observed: list[Tensor],
    _weights: list[float],
    _kind: str,
    images: Tensor,
    *_settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    check_factored_matching_loss(x, delta, observed, images)
    trials, dtype = x[0].shape[0], accumulation_dtype(x[0].dtype)
    size = 0  # of the saved tensor, which only the CPU's backward reads
    for t in x if images.device.type == "cpu" else ():
        tokens = t.shape[1]
        size += trials * tokens * (2 * tokens + t.shape[2])
    sums = x[0].new_empty((len(x), trials, 4), dtype=torch.float64)
    return x[0].new_empty(trials, dtype=dtype), sums, x[0].new_empty(size, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::factored_matching_loss_backward")
def _fake_backward(
    _: Tensor, x: list[Tensor], delta: list[Tensor], *inputs: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    _observed, _sums, _saved, _weights, _kind, images, *_settings = inputs
    return empty_gradients(x), empty_gradients(delta), empty_gradients([images])[0]

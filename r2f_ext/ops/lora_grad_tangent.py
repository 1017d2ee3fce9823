"""`lora_grad_tangent`: how the gradients of the LoRA factors B move with the layers' inputs and output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_lora_grad_tangent
from .graph import call, wants_graph
from .reference import accumulation_dtype, from_rows
from .schemas import NAMESPACE


def lora_grad_tangent(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    dx: Sequence[Tensor],
    ddelta: Sequence[Tensor],
    A: Sequence[Tensor],
    *,
    scales: Sequence[float],
) -> list[Tensor]:
    """Forward-mode derivatives of `lora_grad`'s grad_B in K directions: the inner loop of Gauss-Newton in LoRA space.

    grad_B = scale * delta^T (x A^T) is bilinear in x and delta. Where x moves by dx and delta by ddelta, per group
    and direction,

        grad_B moves by  scale * (ddelta^T (x A^T) + delta^T (dx A^T))

    Args (lists with one entry for each layer; P groups of N tokens each, K directions, rank r):
        x: [P, N, d_in], inputs of the layer.
        delta: [P, N, d_out], loss gradients at its output.
        dx: [K, P, N, d_in]; ddelta: [K, P, N, d_out].
        A: [r, d_in], one for all groups, or [P, r, d_in].
        scales: as for `lora_grad`.

    Returns:
        [K, P, d_out, r] for each layer; on a CPU the transposed view of a tensor [K, P, r, d_out].

    All tensors share one dtype: float32, float64 or bfloat16. Sums are taken and results returned in float32 (float64
    for float64). Any strides and any rank are accepted; empty tensors give zeros of the right shape. Differentiable in
    every tensor.

    Raises:
        ValueError: lists of different lengths; shapes that do not fit together; more than one device.
        TypeError: dtypes that are not supported or differ from each other.
    """
    lists = [list(each) for each in (x, delta, dx, ddelta, A)]
    try:
        tangents: list[Tensor] = call(
            torch.ops.r2f.lora_grad_tangent.default, wants_graph(*lists), *lists, list(scales)
        )
    except Exception:
        check_lora_grad_tangent(x, delta, dx, ddelta, A, scales)  # raises an error that names the argument
        raise
    return tangents


@torch.library.register_fake(f"{NAMESPACE}::lora_grad_tangent")
def _fake(
    x: list[Tensor],
    delta: list[Tensor],
    dx: list[Tensor],
    ddelta: list[Tensor],
    A: list[Tensor],
    scales: list[float],
) -> list[Tensor]:
    check_lora_grad_tangent(x, delta, dx, ddelta, A, scales)
    return [
        from_rows(d.new_empty((*d.shape[:2], A_l.shape[-2], d.shape[3]), dtype=accumulation_dtype(d.dtype)))
        for d, A_l in zip(ddelta, A, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *lists, ctx.scales = inputs
    ctx.layers = len(ctx.scales)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(tensor for each in lists for tensor in each))


def _backward(ctx: Any, to_tangents: list[Tensor | None]) -> tuple[list[Tensor | None] | None, ...]:
    """Written in differentiable operators, so that it can be differentiated again."""
    saved, n = ctx.saved_tensors, ctx.layers
    results: list[list[Tensor | None]] = [[] for _ in range(5)]
    for layer, (scale, to_tangent) in enumerate(zip(ctx.scales, to_tangents, strict=True)):
        tensors = saved[layer::n]
        gradients = [None] * 5 if to_tangent is None else _backward_of_layer(tensors, scale * to_tangent)
        for result, gradient in zip(results, gradients, strict=True):
            result.append(gradient)
    return (*results, None)


def _backward_of_layer(tensors: tuple[Tensor, ...], H: Tensor) -> list[Tensor | None]:
    """The gradients of one layer's x, delta, dx, ddelta and A; shared tensors get the sum over directions or groups."""
    x, delta, dx, ddelta, A = (t.to(H.dtype) for t in tensors)
    to_u, to_du = ddelta @ H, delta @ H  # of u = x A^T and du = dx A^T
    gradients = (
        to_u @ A,
        (dx @ A.mT) @ H.mT,
        to_du @ A,
        (x @ A.mT) @ H.mT,
        to_u.mT @ x + to_du.mT @ dx,
    )
    return [g.sum_to_size(t.shape).to(t.dtype) for g, t in zip(gradients, tensors, strict=True)]


torch.library.register_autograd(f"{NAMESPACE}::lora_grad_tangent", _backward, setup_context=_save)

"""`lora_grad`: the gradients that training gives to the LoRA factors of all layers, for many groups in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_lora_grad
from .graph import call, wants_graph
from .reference import accumulation_dtype, from_rows
from .schemas import NAMESPACE


class LoraGrad(NamedTuple):
    """Per-group gradients of the LoRA factors, layer by layer."""

    grad_A: list[Tensor]  # [P, r, d_in] each; empty without B
    grad_B: list[Tensor]  # [P, d_out, r] each


def lora_grad(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor] | None = None,
    *,
    scales: Sequence[float],
) -> LoraGrad:
    """Gradients of the LoRA factors of linear layers, group by group.

    A layer computes `y = x W^T + scale * x A^T B^T` (Hu et al., 2021, LoRA, Eq. 3). With `delta = dL/dy` and, per
    group p, `G = delta_p^T x_p`, which is never formed:

        grad_A = scale * B^T G = scale * (delta B)^T x
        grad_B = scale * G A^T = scale * delta^T (x A^T)

    Args (lists with one entry for each layer; P groups of N tokens each, rank r; layers may differ in all sizes):
        x: [P, N, d_in], inputs of the layer.
        delta: [P, N, d_out], loss gradients at its output.
        A: [r, d_in], one for all groups, or [P, r, d_in].
        B: [d_out, r], one for all groups, or [P, d_out, r]. None means that every B is 0, as at PEFT's start: then
            every grad_A is zero, and `grad_A` is an empty list.
        scales: alpha / r, or alpha / sqrt(r) for rsLoRA.

    All tensors share one dtype: float32, float64 or bfloat16. Sums are taken and results returned in float32 (float64
    for float64). Any strides and any rank are accepted; empty tensors give zeros of the right shape. On a CPU `grad_B`
    is the transposed view of a tensor [P, r, d_out], elsewhere it is contiguous. Differentiable twice in x, delta, A
    and B. The bfloat16 CUDA kernel may give NaN where the exact result is infinite.

    Raises:
        ValueError: lists of different lengths; shapes that do not fit together; more than one device.
        TypeError: dtypes that are not supported or differ from each other.
    """
    x, delta, A, B = list(x), list(delta), list(A), list(B or [])
    try:
        recorded = wants_graph(x, delta, A, B)
        grad_A, grad_B = call(torch.ops.r2f.lora_grad.default, recorded, x, delta, A, B, list(scales))
    except Exception:
        check_lora_grad(x, delta, A, B, scales)  # raises an error that names the argument
        raise
    return LoraGrad(grad_A, grad_B)


@torch.library.register_fake(f"{NAMESPACE}::lora_grad")
def _fake(
    x: list[Tensor], delta: list[Tensor], A: list[Tensor], B: list[Tensor], scales: list[float]
) -> tuple[list[Tensor], list[Tensor]]:
    check_lora_grad(x, delta, A, B, scales)
    grad_A, grad_B = [], []
    for x_l, delta_l, A_l in zip(x, delta, A, strict=True):
        (groups, _, d_in), d_out, rank = x_l.shape, delta_l.shape[2], A_l.shape[-2]
        dtype = accumulation_dtype(x_l.dtype)
        grad_B.append(from_rows(x_l.new_empty((groups, rank, d_out), dtype=dtype)))
        if B:
            grad_A.append(x_l.new_empty((groups, rank, d_in), dtype=dtype))
    return grad_A, grad_B


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, delta, A, B, ctx.scales = inputs
    ctx.layers, ctx.with_B = len(x), bool(B)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*x, *delta, *A, *B)


def _backward(
    ctx: Any, to_grad_A: list[Tensor | None], to_grad_B: list[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None], list[Tensor | None], None]:
    """Written in differentiable operators, so that it can be differentiated again."""
    saved, n = ctx.saved_tensors, ctx.layers
    lists = [saved[i : i + n] for i in range(0, len(saved), n)]
    results: list[list[Tensor | None]] = [[] for _ in lists]
    for layer, tensors in enumerate(zip(*lists, strict=True)):
        wanted = [needed[layer] for needed in ctx.needs_input_grad[: len(lists)]]
        gradients = _backward_of_layer(
            tensors, wanted, ctx.scales[layer], to_grad_A[layer] if ctx.with_B else None, to_grad_B[layer]
        )
        for result, gradient in zip(results, gradients, strict=True):
            result.append(gradient)
    to_x, to_delta, to_A, to_B = results if ctx.with_B else [*results, []]
    return to_x, to_delta, to_A, to_B, None


def _backward_of_layer(
    tensors: tuple[Tensor, ...],
    wanted: list[bool],
    scale: float,
    to_grad_A: Tensor | None,
    to_grad_B: Tensor | None,
) -> list[Tensor | None]:
    """The gradients of one layer's x, delta, A and, where there is one, B; None where it is not wanted."""
    dtype = accumulation_dtype(tensors[0].dtype)
    x, delta, A, *rest = (t.to(dtype) for t in tensors)
    sums: list[Tensor | None] = [None] * len(tensors)

    def add(place: int, gradient: Tensor) -> None:
        gradient = gradient.sum_to_size(tensors[place].shape)  # a factor that all groups share gets their sum
        present = sums[place]
        sums[place] = gradient if present is None else present + gradient

    if to_grad_B is not None:  # grad_B = scale delta^T u with u = x A^T
        H = scale * to_grad_B
        if wanted[0] or wanted[2]:
            to_u = delta @ H
            if wanted[0]:
                add(0, to_u @ A)
            if wanted[2]:
                add(2, to_u.mT @ x)
        if wanted[1]:
            add(1, (x @ A.mT) @ H.mT)
    if rest and to_grad_A is not None:  # grad_A = scale v^T x with v = delta B
        (B,), H = rest, scale * to_grad_A
        if wanted[1] or wanted[3]:
            to_v = x @ H.mT
            if wanted[1]:
                add(1, to_v @ B.mT)
            if wanted[3]:
                add(3, delta.mT @ to_v)
        if wanted[0]:
            add(0, (delta @ B) @ H)
    return [None if total is None else total.to(t.dtype) for total, t in zip(sums, tensors, strict=True)]


torch.library.register_autograd(f"{NAMESPACE}::lora_grad", _backward, setup_context=_save)

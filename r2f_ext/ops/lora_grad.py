"""`lora_grad`: the gradients that training gives to a layer's LoRA factors, for many groups in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_lora_grad
from .gradients import needs_gradient
from .reference import accumulation_dtype, unmoved_A
from .schemas import NAMESPACE


class LoraGrad(NamedTuple):
    """Per-group gradients of the LoRA factors and, where a step was asked for, the stepped factors."""

    grad_A: Tensor  # [P, r, d_in]
    grad_B: Tensor  # [P, d_out, r]
    A1: Tensor | None  # [P, r, d_in]
    B1: Tensor | None  # [P, d_out, r]


def lora_grad(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    *,
    scale: float,
    lr: float | None = None,
    offsets: Tensor | None = None,
) -> LoraGrad:
    """Gradients of the LoRA factors of one linear layer, group by group, and one SGD step along them.

    The layer computes `y = x W^T + scale * x A^T B^T`. With `delta = dL/dy` and, per group p, `G = delta_p^T x_p`,
    which is never formed:

        grad_A = scale * B^T G = scale * (delta B)^T x        A1 = A - lr * grad_A
        grad_B = scale * G A^T = scale * delta^T (x A^T)      B1 = B - lr * grad_B

    Shapes (P groups of N tokens each, rank r):
        x      [P, N, d_in]       inputs of the layer
        delta  [P, N, d_out]      loss gradients at its output
        A      [r, d_in]          one for all groups, or [P, r, d_in]
        B      [d_out, r]         one for all groups, or [P, d_out, r], or None

    Groups of unequal size: x is [M, d_in], delta is [M, d_out], and `offsets`, int64 [P + 1] on the same device, says
    that group p has the rows offsets[p] <= row < offsets[p + 1]; the first offset is 0, the last M, and none is less
    than the one before (groups without rows give zeros). On a GPU the values are not checked, as that would wait for
    it: wrong ones are cut to rows that exist and give wrong sums.

    `B=None` means B = 0, PEFT's start: grad_A is exactly zero and costs nothing (it and A1 are then expanded tensors:
    clone before writing into them). `lr=None` means that no step is wanted: A1 and B1 are None.

    x, delta, A and B share one dtype: float32, float64 or bfloat16. Sums are taken and results returned in float32
    (float64 for float64). Any strides and any rank are accepted; empty tensors give zeros of the right shape. Results
    are deterministic. Differentiable twice in x, delta, A and B.

    Raises:
        ValueError: shapes that do not fit together, or (on the CPU) offsets that are not in order.
        TypeError: dtypes that are not supported or differ from each other.
    """
    try:
        call = _LoraGrad.apply if needs_gradient(x, delta, A, B) else torch.ops.r2f.lora_grad.default
        grad_A, grad_B, A1, B1 = call(x, delta, A, B, scale, lr, offsets)
    except Exception:
        check_lora_grad(x, delta, A, B, offsets)  # says which argument is wrong and how
        raise
    return LoraGrad(grad_A, grad_B, None if lr is None else A1, None if lr is None else B1)


@torch.library.register_fake(f"{NAMESPACE}::lora_grad")
def _fake(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor | None, scale: float, lr: float | None, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = check_lora_grad(x, delta, A, B, offsets)
    d_in, d_out, rank = x.shape[-1], delta.shape[-1], A.shape[-2]
    dtype = accumulation_dtype(x.dtype)

    def result(wanted: bool, *shape: int) -> Tensor:
        return x.new_empty(shape if wanted else (0,), dtype=dtype)

    has_lr = lr is not None
    if B is None:
        grad_A, A1 = unmoved_A(A, groups, lr)
    else:
        grad_A, A1 = result(True, groups, rank, d_in), result(has_lr, groups, rank, d_in)
    return grad_A, result(True, groups, d_out, rank), A1, result(has_lr, groups, d_out, rank)


class _LoraGrad(torch.autograd.Function):
    """A Function around the raw operator: `register_autograd` makes calls without gradients pay as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, delta: Tensor, A: Tensor, B: Tensor | None, scale: float, lr: float | None, offsets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor, Tensor]
        results = torch.ops.r2f.lora_grad.default(x, delta, A, B, scale, lr, offsets)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, delta, A, B, ctx.scale, ctx.lr, offsets = inputs
        ctx.save_for_backward(x, delta, A, B, offsets)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, to_grad_A: Tensor | None, to_grad_B: Tensor | None, to_A1: Tensor | None, to_B1: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """Written in differentiable operators, so that it can be differentiated again."""
        x, delta, A, B, offsets = ctx.saved_tensors
        dtype = accumulation_dtype(x.dtype)
        to_x = to_delta = to_A = to_B = None

        # A1 = A - lr grad_A: its gradient goes straight to A, and times -lr to grad_A. Likewise B1.
        if ctx.lr is not None:
            to_grad_A = _add(to_grad_A, _times(to_A1, -ctx.lr))
            to_grad_B = _add(to_grad_B, _times(to_B1, -ctx.lr))
            to_A = to_A1
            to_B = to_B1 if B is not None else None

        X, D, A_ = x.to(dtype), delta.to(dtype), A.to(dtype)
        groups = _EqualGroups() if offsets is None else _Groups(offsets, len(x))
        if to_grad_B is not None:  # grad_B = scale D^T U with U = X A^T
            H = ctx.scale * to_grad_B
            to_U = groups.times(D, H)
            to_delta = _add(to_delta, groups.times(groups.times(X, A_.mT), H.mT))
            to_x = _add(to_x, groups.times(to_U, A_))
            to_A = _add(to_A, groups.outer(X, to_U).mT)
        if B is not None and to_grad_A is not None:  # grad_A = scale V^T X with V = D B
            H, B_ = ctx.scale * to_grad_A, B.to(dtype)
            to_V = groups.times(X, H.mT)
            to_x = _add(to_x, groups.times(groups.times(D, B_), H))
            to_delta = _add(to_delta, groups.times(to_V, B_.mT))
            to_B = _add(to_B, groups.outer(D, to_V))
        return _like(to_x, x), _like(to_delta, delta), _like(to_A, A), _like(to_B, B), None, None, None


class _EqualGroups:
    """Products of rows [P, N, ...] with matrices, group by group."""

    def times(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """Each group's rows times its matrix, or times the one for all."""
        return rows @ matrix

    def outer(self, wide: Tensor, narrow: Tensor) -> Tensor:
        """wide^T narrow of each group."""
        return wide.mT @ narrow


class _Groups:
    """The same for rows [M, ...] by offsets, whose values are not waited for."""

    def __init__(self, offsets: Tensor, rows: int):
        every_row = torch.arange(rows, device=offsets.device)
        self.offsets = offsets
        self.of_row = (torch.searchsorted(offsets, every_row, right=True) - 1).clamp(0, len(offsets) - 2)

    def times(self, rows: Tensor, matrix: Tensor) -> Tensor:
        if matrix.ndim == 2:
            return rows @ matrix
        return (rows[:, None, :] @ matrix[self.of_row]).squeeze(1)

    def outer(self, wide: Tensor, narrow: Tensor) -> Tensor:
        """By the operator itself, with A = I: its sums are in a fixed order, those of index_add on a GPU are not."""
        identity = torch.eye(narrow.shape[1], dtype=narrow.dtype, device=narrow.device)
        return lora_grad(narrow, wide, identity, scale=1.0, offsets=self.offsets).grad_B


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _times(a: Tensor | None, factor: float) -> Tensor | None:
    return None if a is None else a * factor


def _like(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """A factor shared by all groups receives the sum over the groups; dtypes follow the input."""
    if gradient is None or tensor is None:
        return None
    return gradient.sum_to_size(tensor.shape).to(tensor.dtype)

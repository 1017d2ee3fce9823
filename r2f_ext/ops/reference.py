"""The operators in plain PyTorch: the formula to read, the default kernel everywhere, and the fast kernels' oracle.

Each function takes exactly the arguments of its schema and is registered for `CompositeExplicitAutograd`, so a kernel
for a particular device replaces it there. Gradients are not taken through these functions: `<op>.py` registers an
explicit backward.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .checks import check_lora_grad, check_lora_grad_tangent
from .schemas import NAMESPACE


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, everything else is summed (and returned) in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lora_grad(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor | None, scale: float, lr: float | None, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G = delta^T x per group; grad_A = scale B^T G, grad_B = scale G A^T, without ever forming G."""
    check_lora_grad(x, delta, A, B, offsets)
    if offsets is not None:
        return _one_by_one(x, delta, A, B, scale, lr, offsets.tolist())
    dtype = accumulation_dtype(x.dtype)
    x, delta, A = x.to(dtype), delta.to(dtype), A.to(dtype)
    nothing = x.new_empty(0)

    u = x @ A.mT  # [P, N, r]
    # (u^T delta)^T rather than delta^T u: the same numbers, about 1.7 times faster in the batched products of the CPU.
    grad_B = (u.mT @ delta).mT.contiguous().mul_(scale)
    if B is None:
        B1 = nothing if lr is None else grad_B * -lr
        return nothing, grad_B, nothing.clone(), B1.clone() if lr is None else B1

    B = B.to(dtype)
    v = delta @ B  # [P, N, r]
    grad_A = (v.mT @ x).mul_(scale)
    if lr is None:
        return grad_A, grad_B, nothing, nothing.clone()
    return grad_A, grad_B, A - lr * grad_A, B - lr * grad_B


def _one_by_one(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor | None, scale: float, lr: float | None, bounds: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups of unequal size: group p has the rows bounds[p] <= row < bounds[p + 1]."""
    if bounds[0] != 0 or bounds[-1] != len(x) or bounds != sorted(bounds):
        raise ValueError(f"lora_grad: offsets must start at 0, never decrease, and end at the {len(x)} rows of x")
    if len(bounds) == 1:
        return lora_grad(x[None, :][:0], delta[None, :][:0], A, B, scale, lr)
    results = [
        lora_grad(
            x[None, first:last],
            delta[None, first:last],
            A[p : p + 1] if A.ndim == 3 else A,
            B[p : p + 1] if B is not None and B.ndim == 3 else B,
            scale,
            lr,
        )
        for p, (first, last) in enumerate(pairwise(bounds))
    ]
    grad_A, grad_B, A1, B1 = (torch.cat(parts) for parts in zip(*results, strict=True))
    return grad_A, grad_B, A1, B1


torch.library.impl(f"{NAMESPACE}::lora_grad", "default", lora_grad)


def lora_grad_tangent(
    x: Tensor, delta: Tensor, dx: Tensor | None, ddelta: Tensor | None, A: Tensor, B: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients are bilinear, so each factor is moved in turn: d(delta^T u) = ddelta^T u + delta^T du."""
    check_lora_grad_tangent(x, delta, dx, ddelta, A, B)
    dtype = accumulation_dtype(x.dtype)
    x, delta, A = x.to(dtype), delta.to(dtype), A.to(dtype)
    B = None if B is None else B.to(dtype)
    grad_A = grad_B = None
    if ddelta is not None:
        ddelta = ddelta.to(dtype)  # [K, P, N, d_out]
        grad_B = (x @ A.mT).mT @ ddelta
        grad_A = None if B is None else (ddelta @ B).mT @ x
    if dx is not None:
        dx = dx.to(dtype)  # [K, P, N, d_in]
        moved_B = (dx @ A.mT).mT @ delta
        grad_B = moved_B if grad_B is None else grad_B + moved_B
        if B is not None:
            moved_A = (delta @ B).mT @ dx
            grad_A = moved_A if grad_A is None else grad_A + moved_A
    assert grad_B is not None, "dx or ddelta is needed"
    return x.new_empty(0) if grad_A is None else grad_A.mul_(scale), grad_B.mT.contiguous().mul_(scale)


torch.library.impl(f"{NAMESPACE}::lora_grad_tangent", "default", lora_grad_tangent)

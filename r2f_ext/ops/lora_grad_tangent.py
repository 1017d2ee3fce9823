"""`lora_grad_tangent`: how the gradients of LoRA factors move with a layer's inputs and output gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_lora_grad_tangent
from .gradients import needs_gradient
from .reference import accumulation_dtype
from .schemas import NAMESPACE


class LoraGradTangent(NamedTuple):
    """Derivatives of the LoRA factors' gradients, one for each direction and group."""

    grad_A: Tensor | None  # [K, P, r, d_in]
    grad_B: Tensor  # [K, P, d_out, r]


def lora_grad_tangent(
    x: Tensor,
    delta: Tensor,
    dx: Tensor | None,
    ddelta: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    *,
    scale: float,
) -> LoraGradTangent:
    """Forward-mode derivatives of `lora_grad` in K directions at once: the hot loop of Gauss-Newton in LoRA space.

    The gradients of `lora_grad` are bilinear in x and delta. Where x moves by dx and delta by ddelta, per group and
    direction,

        grad_B moves by  scale * (ddelta^T (x A^T) + delta^T (dx A^T))
        grad_A moves by  scale * ((ddelta B)^T x + (delta B)^T dx)

    Shapes (P groups of N tokens each, K directions, rank r):
        x       [P, N, d_in]        inputs of the layer
        delta   [P, N, d_out]       loss gradients at its output
        dx      [K, P, N, d_in]     or None: 0, and costs nothing
        ddelta  [K, P, N, d_out]    or None: 0, and costs nothing
        A       [r, d_in]           one for all groups, or [P, r, d_in]
        B       [d_out, r]          one for all groups, or [P, d_out, r], or None: B = 0, and grad_A is None

    All share one dtype: float32, float64 or bfloat16. Sums are taken and results returned in float32 (float64 for
    float64). Any strides and any rank are accepted; empty tensors give zeros of the right shape. Results are
    deterministic. Differentiable in every tensor.

    Raises:
        ValueError: shapes that do not fit together; neither dx nor ddelta.
        TypeError: dtypes that are not supported or differ from each other.
    """
    try:
        needed = needs_gradient(x, delta, dx, ddelta, A, B)
        call = _LoraGradTangent.apply if needed else torch.ops.r2f.lora_grad_tangent.default
        grad_A, grad_B = call(x, delta, dx, ddelta, A, B, scale)
    except Exception:
        check_lora_grad_tangent(x, delta, dx, ddelta, A, B)  # says which argument is wrong and how
        raise
    return LoraGradTangent(None if B is None else grad_A, grad_B)


@torch.library.register_fake(f"{NAMESPACE}::lora_grad_tangent")
def _fake(
    x: Tensor, delta: Tensor, dx: Tensor | None, ddelta: Tensor | None, A: Tensor, B: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    blocks = (check_lora_grad_tangent(x, delta, dx, ddelta, A, B), x.shape[0])
    dtype, rank = accumulation_dtype(x.dtype), A.shape[-2]
    grad_A = x.new_empty((0,) if B is None else (*blocks, rank, x.shape[2]), dtype=dtype)
    return grad_A, x.new_empty((*blocks, delta.shape[2], rank), dtype=dtype)


class _LoraGradTangent(torch.autograd.Function):
    """A Function around the raw operator: `register_autograd` makes calls without gradients pay as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, delta: Tensor, dx: Tensor | None, ddelta: Tensor | None, A: Tensor, B: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        results: tuple[Tensor, Tensor]
        results = torch.ops.r2f.lora_grad_tangent.default(x, delta, dx, ddelta, A, B, scale)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, to_grad_A: Tensor | None, to_grad_B: Tensor | None) -> tuple[Tensor | None, ...]:
        """Written in ordinary differentiable PyTorch. Each of the four terms gives to two tensors and a factor."""
        x, delta, dx, ddelta, A, B = ctx.saved_tensors
        dtype = accumulation_dtype(x.dtype)
        X, D, dX, dD, B_ = (None if t is None else t.to(dtype) for t in (x, delta, dx, ddelta, B))
        A_ = A.to(dtype)
        to: dict[str, Tensor] = {}

        def add(name: str, gradient: Tensor) -> None:
            to[name] = to[name] + gradient if name in to else gradient

        if to_grad_B is not None:  # ddelta^T (x A^T) + delta^T (dx A^T)
            H = ctx.scale * to_grad_B
            for (a_name, a), (b_name, b) in ((("ddelta", dD), ("x", X)), (("delta", D), ("dx", dX))):
                if a is None or b is None:
                    continue
                to_u = a @ H
                add(a_name, (b @ A_.mT) @ H.mT)
                add(b_name, to_u @ A_)
                add("A", to_u.mT @ b)
        if B_ is not None and to_grad_A is not None:  # (ddelta B)^T x + (delta B)^T dx
            H = ctx.scale * to_grad_A
            for (a_name, a), (b_name, b) in ((("ddelta", dD), ("x", X)), (("delta", D), ("dx", dX))):
                if a is None or b is None:
                    continue
                to_v = b @ H.mT
                add(a_name, to_v @ B_.mT)
                add(b_name, (a @ B_) @ H)
                add("B", a.mT @ to_v)

        def like(name: str, tensor: Tensor | None) -> Tensor | None:
            """What all directions or groups share receives the sum over them; dtypes follow the input."""
            return to[name].sum_to_size(tensor.shape).to(tensor.dtype) if tensor is not None and name in to else None

        named = (("x", x), ("delta", delta), ("dx", dx), ("ddelta", ddelta), ("A", A), ("B", B))
        return (*(like(name, tensor) for name, tensor in named), None)

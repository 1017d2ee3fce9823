"""LoRA updates from captured factors: what one step from B = 0 would do to an adapter."""

from __future__ import annotations

from torch import Tensor

from r2f_ext.ops import lora_grad
from r2f_ext.types import FactoredGradient, Target


def project(target: Target, gradient: FactoredGradient, a: dict[str, Tensor]) -> dict[str, Tensor]:
    """The update of an adapter with A = `a` by one step from B = 0, for each group: s G A^T [P, d_out, r] per layer.

    At B = 0 the factors (x, delta) do not depend on A: captured once, they serve every adapter of the base.

    Args:
        target: the layers, with their scales s.
        gradient: factors of G = delta^T x, x [P, N, d_in] and delta [P, N, d_out], float32, float64 or bfloat16.
        a: name -> A [r, d_in] for all groups, or [P, r, d_in].

    Returns:
        name -> float32 (float64 for float64). Differentiable twice.
    """
    x = [gradient.x[name] for name in target.names]
    found = lora_grad(
        x,
        [gradient.delta[name] for name in target.names],
        [a[name].to(x_l.dtype) for name, x_l in zip(target.names, x, strict=True)],
        scales=[layer.scale for layer in target.layers],
    )
    return dict(zip(target.names, found.grad_B, strict=True))

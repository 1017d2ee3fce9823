"""`signed_adam_step_`: one step of Adam on a gradient's sign, and the projection onto the box of pixels, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_signed_adam_step
from .schemas import NAMESPACE


def signed_adam_step_(
    image: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    low: float | None = 0.0,
    high: float | None = 1.0,
    sign: bool = True,
) -> None:
    """One step of Adam (Kingma and Ba, 2015, Algorithm 1) from g = sign(gradient), elementwise and in place:

        exp_avg    <- beta1 exp_avg + (1 - beta1) g
        exp_avg_sq <- beta2 exp_avg_sq + (1 - beta2) g^2
        image      <- clamp(image - lr / (1 - beta1^step) exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps),
                            low, high)

    Signs as in Geiping et al., "Inverting Gradients", NeurIPS 2020; `sign=False` takes the gradient itself (plain
    Adam). Agrees with `torch.optim.Adam` on the signed gradient followed by `clamp_`, up to rounding.

    Shapes: image, gradient, exp_avg and exp_avg_sq have one shape, dtype (float32 or float64) and device; the last two
    start as zeros. `step` counts from 1. `low` or `high` None: no such bound. Any strides; contiguous ones are fastest.
    Not differentiable; image may be a leaf that requires a gradient.

    A CUDA graph keeps the `lr` and `step` of its capture.

    Raises:
        ValueError: shapes or devices that differ, a step below 1, or low > high.
        TypeError: dtypes that differ or are not supported.
    """
    if step < 1:
        raise ValueError(f"signed_adam_step_: step counts from 1; got {step}")
    if low is not None and high is not None and low > high:
        raise ValueError(f"signed_adam_step_: low must not be above high; got {low} and {high}")
    try:
        with torch.no_grad():
            torch.ops.r2f.signed_adam_step_.default(
                image, gradient, exp_avg, exp_avg_sq, lr, *betas, eps, step, low, high, sign
            )
    except Exception:
        check_signed_adam_step(image, gradient, exp_avg, exp_avg_sq)  # raises an error that names the argument
        raise
    # Autograd's version counters, so that a backward that needs the old values raises an error.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((image, exp_avg, exp_avg_sq))


@torch.library.register_fake(f"{NAMESPACE}::signed_adam_step_")
def _fake(image: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *_settings: Any) -> None:
    check_signed_adam_step(image, gradient, exp_avg, exp_avg_sq)

"""`total_variation`: how rough images are, image by image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import DTYPES
from .reference import accumulation_dtype
from .schemas import NAMESPACE


def total_variation(images: Tensor, isotropic: bool = False) -> Tensor:
    """Total variation (Rudin, Osher and Fatemi, 1992) of T images [T, c, h, w]: [T].

    With differences dy = x[i+1, j] - x[i, j] and dx = x[i, j+1] - x[i, j]:

        anisotropic (default)   mean |dy| + mean |dx|, each over the pairs that there are
        isotropic               mean over channels and pixels of sqrt(dx^2 + dy^2 + 1e-12), with dx = 0 in the last
                                column and dy = 0 in the last row

    Images are float32, float64 or bfloat16 of any strides; the result is float32 (float64 for float64). An image
    without pairs, like a single pixel, has anisotropic value 0. Deterministic; differentiable twice (the derivative of
    |d| at 0 is 0).

    Raises:
        ValueError: images are not [T, c, h, w].
        TypeError: a dtype that is not supported.
    """
    if images.dim() != 4:
        raise ValueError(f"total_variation: images must be [T, c, h, w]; got {list(images.shape)}")
    if images.dtype not in DTYPES:
        raise TypeError(f"total_variation: images must be float32, float64 or bfloat16; got {images.dtype}")
    value: Tensor = _TotalVariation.apply(images, bool(isotropic))
    return value


class _TotalVariation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, isotropic: bool) -> Tensor:
        ctx.isotropic = isotropic
        ctx.save_for_backward(images)
        value: Tensor = torch.ops.r2f.total_variation.default(images, isotropic)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (images,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # of operators that can be differentiated again
            return reference.total_variation_backward(grad, images, ctx.isotropic).to(images.dtype), None
        return torch.ops.r2f.total_variation_backward.default(grad, images, ctx.isotropic).to(images.dtype), None


@torch.library.register_fake(f"{NAMESPACE}::total_variation")
def _fake(images: Tensor, isotropic: bool) -> Tensor:
    return images.new_empty(images.shape[:1], dtype=accumulation_dtype(images.dtype))


@torch.library.register_fake(f"{NAMESPACE}::total_variation_backward")
def _fake_backward(grad: Tensor, images: Tensor, isotropic: bool) -> Tensor:
    return images.new_empty(images.shape, dtype=accumulation_dtype(images.dtype))

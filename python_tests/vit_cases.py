"""Small ViTs and smooth images for the tests of the closed forms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from r2f_ext.types import BaseModel


def small_vit(dtype: torch.dtype = torch.float64, **changes) -> BaseModel:
    """16x16x3, patch 4, d = 96, 2 blocks; every norm, bias and position is moved off its initial value."""
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 4, "num_classes": 10}
    model = VisionTransformer(**(options | changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.requires_grad_(False)
    size = options["img_size"] if "img_size" not in changes else changes["img_size"]
    return BaseModel(model, "small", (3, size, size), (0.4, 0.5, 0.6), (0.3, 0.25, 0.2), 10)


def smooth_images(n: int, size: int) -> Tensor:
    """[n, 3, size, size] in [0, 1]."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


def psnr(found: Tensor, truth: Tensor) -> float:
    """The worst over images [n, c, h, w], in dB."""
    error = (found.double() - truth.double()).square().mean((1, 2, 3)).clamp_min(1e-30)
    return (-10 * error.log10()).min().item()

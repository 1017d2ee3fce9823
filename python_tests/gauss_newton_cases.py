"""A small problem of Gauss-Newton in LoRA space: a ViT in float64, and images that differ in 40 directions."""

from functools import cache

import torch
from cases import target_of
from vit_cases import small_vit

from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.inversion.update_map import Subspace
from r2f_ext.models.timm_base import unfuse_attention
from r2f_ext.types import Reconstruction

NAMES = tuple(f"blocks.{b}.{layer}" for b in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
SHAPE = torch.Size((3, 8, 8))


@cache
def small_problem():
    """target, A, updates of two images of which only 40 directions are unknown, the images, labels, the subspace."""
    base = small_vit(img_size=8, embed_dim=64)
    unfuse_attention(base.model)
    target = target_of(base, NAMES, rank=8)
    torch.manual_seed(0)
    a = {
        layer.name: (2 * torch.rand(8, layer.d_in, dtype=torch.float64) - 1) / layer.d_in**0.5
        for layer in target.layers
    }
    smooth = torch.randn(40, 192, dtype=torch.float64) * 0.05
    proxies = (0.5 + torch.randn(300, 40, dtype=torch.float64) @ smooth / 40**0.5).unflatten(1, SHAPE)
    images, labels = proxies[:2].clamp(0, 1), torch.tensor([1, 4])
    with Capture(target) as capture:
        gradient = capture(images[:, None], labels[:, None])
    return target, a, project(target, gradient, a), images, labels, Subspace.of(proxies[2:])


def start_near(images, labels, subspace, distance):
    torch.manual_seed(1)
    basis = subspace.basis
    shift = torch.randn(len(images), basis.shape[1], dtype=torch.float64) * distance @ basis.T
    return Reconstruction("given", (images + shift.view_as(images)).clamp(0, 1), labels, "", 0.0)

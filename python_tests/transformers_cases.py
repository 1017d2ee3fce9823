"""Small random image classifiers of transformers, one of each family that adapters are made for."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

CLASSES = 5
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 16}
FAMILIES = {
    "vit": (ViTForImageClassification, ViTConfig, SIZES),
    "deit": (DeiTForImageClassification, DeiTConfig, SIZES),
    "beit": (BeitForImageClassification, BeitConfig, SIZES | {"use_relative_position_bias": True}),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config, SIZES | {"mlp_ratio": 2}),
    "clip": (CLIPForImageClassification, CLIPConfig, {"vision_config": SIZES, "text_config": TEXT}),
    "siglip": (SiglipForImageClassification, SiglipConfig, {"vision_config": SIZES, "text_config": TEXT}),
}
PATCHES = {"clip": "patch_embedding", "siglip": "patch_embedding"}  # others: projection


def classifier(family: str, seed: int = 0, **changes) -> nn.Module:
    """A classifier in eval mode whose every parameter is moved off its initial value."""
    kind, config, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    return moved(kind(config(**sizes | {"num_labels": CLASSES} | changes)))


def dinov3() -> nn.Module:
    """transformers has no image classifier of DINOv3."""
    torch.manual_seed(0)
    return moved(DINOv3ViTModel(DINOv3ViTConfig(**SIZES, num_register_tokens=2)))


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()

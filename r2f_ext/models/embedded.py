"""The embedded default: a small ViT that ships inside the package.

Patch 4, d = 128 and 65 tokens, so that patch_dim + 1 = 49 <= d - tokens = 63: the route `attention_rowspace` can be
exact (docs/methods.md, section 3c).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

ASSETS = Path(__file__).parent / "assets"
WEIGHTS = ASSETS / "embedded_vit.safetensors"

# Pixel statistics of Fashion-MNIST train, used for all three channels.
PIXEL_MEAN = (0.2860, 0.2860, 0.2860)
PIXEL_STD = (0.3530, 0.3530, 0.3530)
NUM_CLASSES = 10
HEAD_SEED = 1

# The architecture, as timm's create_model(ARCHITECTURE, num_classes=NUM_CLASSES, **MODEL_ARGS) builds it too.
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "in_chans": 3,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2.0,
}


def build_embedded_vit() -> VisionTransformer:
    """Return the architecture with timm's random initialisation: 32x32x3, patch 4, d = 128, 4 blocks."""
    return VisionTransformer(num_classes=NUM_CLASSES, **MODEL_ARGS)


def reset_head(model: VisionTransformer, seed: int = HEAD_SEED) -> None:
    """Give `model` the fresh classification head that every client of one server starts from.

    A head that is already trained on the task gives gradients near zero; fine-tuning starts from a fresh one.
    """
    generator = torch.Generator().manual_seed(seed)
    head = model.get_classifier()
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.02)
        head.bias.zero_()

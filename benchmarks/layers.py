"""Shapes of the linear layers that the operators' rows run on, as (d_out, d_in)."""

from __future__ import annotations

EMBEDDED = [(384, 128), (128, 128), (256, 128), (128, 256)] * 4  # qkv, proj, fc1, fc2 of the embedded model's 4 blocks
EMBEDDED_TOKENS = 65
VIT_B_BLOCK = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]  # one block of ViT-B/16; the model has 12
VIT_B_TOKENS = 197

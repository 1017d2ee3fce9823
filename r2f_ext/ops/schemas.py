"""Every custom operator of r2f, by its schema. This file is the table of contents of `ops` and `csrc`.

An operator exists as `torch.ops.r2f.<name>` as soon as `r2f_ext.ops` is imported, on any machine: `reference.py` gives
it a plain PyTorch kernel, and the compiled module, where there is one, adds faster kernels for CPU and CUDA tensors.
The dispatcher picks.
"""

from __future__ import annotations

import torch

NAMESPACE = "r2f"

SCHEMAS: dict[str, str] = {
    # LoRA-factor gradients of one linear layer for many groups, and the SGD-stepped factors.
    # What costs no arithmetic is left out, as a tensor of size 0, and the wrapper fills it in:
    # without B, grad_A and A1; without lr, A1 and B1. With offsets, groups differ in size.
    "lora_grad": (
        "(Tensor x, Tensor delta, Tensor A, Tensor? B, float scale, float? lr, Tensor? offsets=None)"
        " -> (Tensor grad_A, Tensor grad_B, Tensor A1, Tensor B1)"
    ),
    # How they move when x and delta do, in many directions at once. Without B, grad_A is of size 0.
    "lora_grad_tangent": (
        "(Tensor x, Tensor delta, Tensor? dx, Tensor? ddelta, Tensor A, Tensor? B, float scale)"
        " -> (Tensor grad_A, Tensor grad_B)"
    ),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema)

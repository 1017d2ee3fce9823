"""The adapter that pairs are made for, and the pass of the bare model that pairs are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.audit.victims import TARGET_MODULES
from r2f_ext.pairs import random_a
from r2f_ext.types import AdaptedLayer, BaseModel, Target

RANK, ALPHA = 8, 16


def all_linear(base: BaseModel) -> Target:
    """An adapter of rank 8 on qkv, proj, fc1 and fc2 of every block."""
    layers = [
        AdaptedLayer(name, len(module.weight), module.weight.shape[1], RANK, ALPHA / RANK)
        for name, module in base.model.named_modules()
        if name.endswith(TARGET_MODULES)
    ]
    return Target(base, tuple(layers))


def initial_a(target: Target) -> dict[str, Tensor]:
    """One A [r, d_in] a layer, as PEFT draws it."""
    return {name: each[0] for name, each in random_a(target, 0, 0, 1).items()}


def bare_model(base: BaseModel, images: Tensor, labels: Tensor, batch: int) -> Callable[[], None]:
    """Forward and backward to the pixels of images [n, c, h, w], `batch` images per pass, without weight gradients."""
    inputs = base.normalize(images)

    def run() -> None:
        for first in range(0, len(labels), batch):
            # The [:] makes x a view: FlopCounterMode counts a backward pass to a leaf only in .backward().
            x = inputs[first : first + batch].clone().requires_grad_()[:]
            loss = F.cross_entropy(base.model(x), labels[first : first + batch], reduction="sum")
            torch.autograd.grad(loss, x)

    return run

"""Pretraining of the embedded architecture: how its weights were made, and how further bases are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from r2f_ext.gpu import seeded
from r2f_ext.models.embedded import PIXEL_MEAN, PIXEL_STD, build_embedded_vit
from r2f_ext.progress import Advance, no_progress

WARMUP = 200  # steps of rising learning rate, at most a quarter of all
WEIGHT_DECAY = 0.05
REPORTED = 100  # steps between two reports of the loss


@dataclass(frozen=True)
class Pretraining:
    """A recipe: AdamW with a warm-up and a cosine schedule to 0, on the cross-entropy.

    Attributes:
        steps: of all epochs together; batch: images of a step; lr: the highest learning rate.
        seed: of the initial weights and of the order of the images.
    """

    steps: int
    batch: int = 64
    lr: float = 1e-3
    seed: int = 0

    def factor(self, step: int) -> float:
        """The learning rate of a step as a share of `lr`."""
        warmup = max(1, min(WARMUP, self.steps // 4))
        return min(1.0, step / warmup) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def pretrain(images: Tensor, labels: Tensor, recipe: Pretraining, advance: Advance = no_progress) -> VisionTransformer:
    """Train the embedded architecture from random weights on the CPU, in as many epochs as the steps fill.

    Args:
        images: uint8 [n, 1 or 3, 32, 32], n at least the batch; labels: int64 [n], below 10.
        advance: called with the steps done and, every 100 steps, the loss.

    Returns:
        the model in training mode, with the head that it was trained with (see `reset_head`).
    """
    with seeded(recipe.seed):
        model = build_embedded_vit()
        optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.factor)
        per_epoch = len(images) // recipe.batch
        for step in range(recipe.steps):
            place = step % per_epoch
            if place == 0:
                order = torch.randperm(len(images))
            batch = order[place * recipe.batch : (place + 1) * recipe.batch]
            loss = F.cross_entropy(model(_to_input(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            told = (step + 1) % REPORTED == 0 or step + 1 == recipe.steps
            advance(1, f"step {step + 1} of {recipe.steps}: loss {loss.item():.3f}" if told else "")
    return model


@torch.no_grad()
def classification_accuracy(model: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    """The share of images uint8 [n, 1 or 3, 32, 32] that the model, put into eval mode, labels as `labels` [n] do."""
    model.eval()
    parts = zip(images.split(500), labels.split(500), strict=True)
    return float(sum((model(_to_input(x)).argmax(1) == y).sum() for x, y in parts)) / len(labels)


def _to_input(images: Tensor) -> Tensor:
    """uint8 [n, 1 or 3, 32, 32] -> what the model reads, float [n, 3, 32, 32]."""
    pixels = images.float().div(255)
    return ((pixels - PIXEL_MEAN[0]) / PIXEL_STD[0]).expand(-1, 3, -1, -1)

"""Amortised inversion (METHODS 3d): kernel ridge straight from the LoRA update to the image, fitted on proxy pairs.

The kernel sees only directions: with c the cosine of two updates averaged over layers,
k = exp(-2 gamma (1 - c)). So the victim's learning rate, unknown, plays no part.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.linalg import gram, sum_in_place
from r2f_ext.types import Reconstruction

GAMMAS = (0.5, 1.0, 2.0)
RIDGES = (3e-3, 1e-2, 3e-2, 1e-1)
SELECTION_PAIRS = 2000  # gamma and ridge are chosen on a part: they hardly depend on the count


@dataclass(frozen=True)
class Choice:
    """The kernel width and ridge that did best on held-out proxy pairs, and their PSNR there in dB."""

    gamma: float
    ridge: float
    held_out_psnr_db: float


class AmortisedInverter:
    """Kernel ridge from updates to images and labels.

    Args:
        updates: name -> proxy updates [N, d_out, r] or flat [N, d_out * r].
        images: [N, c, h, w] in [0, 1], one an update (batch 1).
        labels: [N] int64.
        num_classes: width of the one-hot label target.

    Raises:
        R2FError: fewer than 20 pairs.
    """

    def __init__(self, updates: dict[str, Tensor], images: Tensor, labels: Tensor, num_classes: int) -> None:
        if len(images) < 20:
            raise R2FError(f"the amortised route needs at least 20 proxy pairs, got {len(images)}: use a larger proxy.")
        self.shape = images.shape[1:]
        self.pixels = images[0].numel()
        self.units = {name: _unit(update) for name, update in updates.items()}
        wanted = torch.cat([images.flatten(1), F.one_hot(labels, num_classes).float()], dim=1)
        self.mean = wanted.mean(0)
        cosine = sum_in_place(gram(unit) for unit in self.units.values()).div_(len(self.units))
        self.choice = _select(cosine, wanted, self.pixels)
        kernel = _kernel(cosine, self.choice.gamma)
        kernel.diagonal().add_(self.choice.ridge)
        self.dual = torch.cholesky_solve(wanted - self.mean, torch.linalg.cholesky(kernel))
        others = cosine[:SELECTION_PAIRS, :SELECTION_PAIRS].fill_diagonal_(-1)
        self.usual_similarity = float(others.amax(1).quantile(0.05))

    def invert(self, updates: dict[str, Tensor]) -> Reconstruction:
        """Updates of V victims [V, d_out, r] a layer -> images and labels."""
        began = time.perf_counter()
        cosine = self._cosine(updates)
        estimate = _kernel(cosine, self.choice.gamma) @ self.dual + self.mean
        images = estimate[:, : self.pixels].clamp(0, 1).unflatten(1, self.shape)
        labels = estimate[:, self.pixels :].argmax(1)
        why = (
            f"statistical estimate from {len(self.dual)} proxy pairs (kernel ridge, gamma {self.choice.gamma:g}, "
            f"lambda {self.choice.ridge:g}); {self.choice.held_out_psnr_db:.1f} dB on held-out proxies"
        )
        details = {"held_out_psnr_db": self.choice.held_out_psnr_db}
        return Reconstruction("amortised", images, labels, why, time.perf_counter() - began, details)

    def far_from_proxy(self, updates: dict[str, Tensor]) -> Tensor:
        """Bool [V]: whose update is less like any proxy update than 19 in 20 of those are like their nearest.

        For those the estimate is not to be trusted.
        """
        return self._cosine(updates).amax(1) < self.usual_similarity

    def _cosine(self, updates: dict[str, Tensor]) -> Tensor:
        """Cosine [V, N] of updates with the proxies', averaged over layers."""
        parts = (_unit(updates[name]) @ unit.mT for name, unit in self.units.items())
        return sum_in_place(parts).div_(len(self.units))


def _unit(update: Tensor) -> Tensor:
    return F.normalize(update.flatten(1), dim=1, eps=1e-30)


def _kernel(cosine: Tensor, gamma: float) -> Tensor:
    return torch.exp((cosine - 1) * (2 * gamma))


def _select(cosine: Tensor, wanted: Tensor, pixels: int) -> Choice:
    """Choose gamma and ridge by PSNR of images held out from the first SELECTION_PAIRS pairs."""
    count = min(SELECTION_PAIRS, len(cosine))
    train = count - count // 6
    mean = wanted[:train].mean(0)
    best = Choice(GAMMAS[0], RIDGES[-1], float("-inf"))
    for gamma in GAMMAS:
        kernel = _kernel(cosine[:count, :count], gamma)
        for ridge in RIDGES:
            damped = kernel[:train, :train].clone()
            damped.diagonal().add_(ridge)
            dual = torch.cholesky_solve(wanted[:train] - mean, torch.linalg.cholesky(damped))
            error = kernel[train:, :train] @ dual + mean - wanted[train:count]
            psnr = float(-10 * torch.log10(error[:, :pixels].square().mean(1).clamp_min(1e-10)).mean())
            best = max(best, Choice(gamma, ridge, psnr), key=lambda choice: choice.held_out_psnr_db)
    return best

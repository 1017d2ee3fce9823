"""Assignment of reconstructions to originals when their order is unknown."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign(images: Tensor, originals: Tensor) -> Tensor:
    """Indices int64 [n] of the originals [m, c, h, w], m >= n, with the largest summed PSNR to images [n, c, h, w].

    Each original is taken at most once (Hungarian method).
    """
    error = torch.cdist(images.flatten(1).double(), originals.flatten(1).double()).square().clamp_min(1e-20)
    _, columns = linear_sum_assignment(10 * torch.log10(error).numpy())
    return torch.from_numpy(columns)


def assign_groups(images: Tensor, originals: Tensor) -> Tensor:
    """Images [V, b, c, h, w] of V groups, each group in the order of its originals [V, b, c, h, w]: see `assign`."""
    ordered = [one[assign(truth, one)] for one, truth in zip(images, originals, strict=True)]
    return torch.stack(ordered)

"""Plain PyTorch that several rivals share."""

from __future__ import annotations

from torch import Tensor

TV_WEIGHT = 0.05


def variation(images: Tensor) -> Tensor:
    """Anisotropic total variation [n] of images [n, c, h, w]: mean absolute differences of neighbours."""
    rows = (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 2, 3))
    return rows + (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3))

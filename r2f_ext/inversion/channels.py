"""Removes colours that no public image has; a search over three channels adds them even if all proxies are gray.

Where the update does not determine the image, a search also fits it with colours. The covariance of the proxies'
channels shows which combinations of channels vary at all. For an estimate that looks gray, only the gray ones among the
public images count: the update of a gray image shows that it is gray.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = 1e-6  # share of the largest variance: what rounding to 8 bits leaves between equal channels
# Colour up to which an image is gray: a public image, and an estimate, which mixes public images in colour.
GRAY, NEARLY_GRAY = 1e-3, 0.02


def colour_of(images: Tensor) -> Tensor:
    """Root mean square deviation of the channels from their mean, [n]; 0 for a gray image [n, c, h, w]."""
    return (images - images.mean(1, keepdim=True)).square().mean((1, 2, 3)).sqrt()


def without_foreign_colours(found: Tensor, start: Tensor, public: Tensor) -> Tensor:
    """`found` less its differences from `start` in combinations of channels in which public images do not vary: gray
    ones, if there are any, where `start` looks gray, else all.

    Args:
        found, start: [V, c, h, w] in [0, 1].
        public: [n, c, h, w].
    """
    kept, gray = _varying_like(public, found, start), public[colour_of(public) < GRAY]
    if len(gray) in (0, len(public)):
        return kept
    looks_gray = (colour_of(start) < NEARLY_GRAY)[:, None, None, None]
    return torch.where(looks_gray, _varying_like(gray, found, start), kept)


def _varying_like(public: Tensor, found: Tensor, start: Tensor) -> Tensor:
    """`found` less its differences from `start` in combinations of channels in which `public` does not vary."""
    variances, directions = torch.linalg.eigh(
        torch.cov(public.transpose(0, 1).flatten(1).double()).view([found.shape[1]] * 2)
    )
    varying = directions[:, variances > NEGLIGIBLE * variances[-1]]
    if varying.shape[1] in (0, found.shape[1]):
        return found
    kept = torch.einsum("ij,vjhw->vihw", (varying @ varying.mT).to(found), found - start)
    return (start + kept).clamp(0, 1)

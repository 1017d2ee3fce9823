"""Removes colours that no public image has; a search over three channels adds them even if all proxies are gray.

Where the update does not determine the image, a search also fits it with colours. The covariance of the proxies'
channels shows which combinations of channels vary at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = 1e-6  # share of the largest variance: what rounding to 8 bits leaves between equal channels


def without_foreign_colours(found: Tensor, start: Tensor, public: Tensor) -> Tensor:
    """`found` less its differences from `start` in combinations of channels in which public images do not vary.

    Args:
        found, start: [V, c, h, w] in [0, 1].
        public: [n, c, h, w].
    """
    variances, directions = torch.linalg.eigh(
        torch.cov(public.transpose(0, 1).flatten(1).double()).view([found.shape[1]] * 2)
    )
    varying = directions[:, variances > NEGLIGIBLE * variances[-1]]
    if varying.shape[1] in (0, found.shape[1]):
        return found
    kept = torch.einsum("ij,vjhw->vihw", (varying @ varying.mT).to(found), found - start)
    return (start + kept).clamp(0, 1)

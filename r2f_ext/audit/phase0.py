"""Phase 0: how well does the exact full gradient invert, in closed form? The ceiling of every other route."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import ImageSet
from r2f_ext.inversion.phase0 import phase0
from r2f_ext.types import BaseModel


def run_phase0(base: BaseModel, private: ImageSet) -> tuple[list[dict[str, Any]], list[tuple[str, Tensor]]]:
    """Take each image's exact gradient, invert it by every closed form the count allows, and score.

    Returns:
        figures [{route, psnr_db_mean, psnr_db_min, seconds, why}] and pictures [(route, images [n, c, h, w])].
    """
    originals, labels = private.batch(slice(None)), private.labels
    figures, pictures = [], []
    for found in phase0(base, originals.to(base.device), labels.to(base.device)).reconstructions:
        psnr = psnr_db(found.images.cpu(), originals)
        figures.append(
            {
                "route": found.route,
                "psnr_db_mean": float(psnr.mean()),
                "psnr_db_min": float(psnr.min()),
                "seconds": found.seconds,
                "why": found.why,
            }
        )
        pictures.append((found.route, found.images.cpu()))
    return figures, pictures

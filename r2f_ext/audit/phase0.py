"""Phase 0 in an audit: inversion of the private images' exact gradients, the upper bound for all other routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import ImageSet
from r2f_ext.inversion.phase0 import phase0
from r2f_ext.inversion.route import Verdict
from r2f_ext.types import BaseModel


@dataclass(frozen=True)
class Phase0Report:
    """One closed form on exact gradients: PSNR of n images in dB, seconds, and images [n, c, h, w] on the CPU."""

    route: str
    psnr_db_mean: float
    psnr_db_min: float
    seconds: float
    why: str
    images: Tensor

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "images"}


def run_phase0(base: BaseModel, private: ImageSet) -> tuple[list[Phase0Report], dict[str, Verdict]]:
    """Invert each image's exact gradient by every closed form that the count allows, and score the result.

    Returns:
        (one report per route that ran, every route's verdict).
    """
    originals, labels = private.batch(slice(None)), private.labels
    outcome = phase0(base, originals.to(base.device), labels.to(base.device))
    reports = []
    for found in outcome.reconstructions:
        images = found.images.cpu()
        psnr = psnr_db(images, originals)
        reports.append(
            Phase0Report(found.route, float(psnr.mean()), float(psnr.min()), found.seconds, found.why, images)
        )
    return reports, outcome.verdicts

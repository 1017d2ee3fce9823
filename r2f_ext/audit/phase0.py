"""Phase 0: inversion of the private images' exact gradients, the upper bound for all other routes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.audit.schema import ClosedFormFigures
from r2f_ext.data import ImageSet
from r2f_ext.errors import R2FError
from r2f_ext.gpu import float32_products
from r2f_ext.inversion.exact_gradients import exact_gradients
from r2f_ext.inversion.route import Certainty, Problem, Verdict
from r2f_ext.inversion.routes import registry, run_routes, verdicts_of
from r2f_ext.types import BaseModel


@dataclass(frozen=True)
class Phase0Report:
    """One closed form on exact gradients, and its images [n, c, h, w] on the CPU."""

    figures: ClosedFormFigures
    images: Tensor


@float32_products()
def phase0(base: BaseModel, private: ImageSet) -> tuple[list[Phase0Report], dict[str, Verdict]]:
    """Run the routes that read exact gradients on each image's own, where the count allows it, and score the results.

    Returns:
        (one report per route that ran, every route's verdict). A base that closed forms do not fit (B/16 for the row
        space, any ResNet) gives fewer reports, or none.

    Raises:
        R2FError: there is no image, the images do not fit the base, or a gradient is zero or not finite.
    """
    if len(private) == 0:
        raise R2FError("phase 0 needs at least one image.")
    names = [name for name, route in registry().items() if route.reads == ("gradients",)]
    verdicts = verdicts_of(Problem(base))
    if all(verdicts[name].certainty is Certainty.REFUSED for name in names):
        return [], verdicts
    originals = private.batch(slice(None))
    problem = Problem(base, gradients=exact_gradients(base, originals.to(base.device), private.labels.to(base.device)))
    reports = []
    for found in run_routes(problem, verdicts, names).found():
        images = found.images.cpu()
        psnr = psnr_db(images, originals)
        figures = ClosedFormFigures(found.route, float(psnr.mean()), float(psnr.min()), found.seconds, found.why)
        reports.append(Phase0Report(figures, images))
    return reports, verdicts

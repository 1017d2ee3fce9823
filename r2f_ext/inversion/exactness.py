"""How precisely an update determines the image that was found for it (docs/methods.md, 3f).

A small residual alone does not make an image the victim's: the update may not depend on all of the image, and an image
of another model (a batch, another label, another recipe) may nearly reproduce it. `bound_error` therefore

1. linearises the update map z at the image in *all* pixels: J = dz / dpixels, eigenvalues s_i^2 of J^T J; in float64,
   unless the model's own arithmetic is precise enough for the smallest s_i and no axis can be free (`PixelAxes`);
2. draws the errors that rounding leaves in z: of the stored factors and of the model's own arithmetic. An error n moves
   the image by J^+ n, so by u_i . n / s_i along axis i. Axes along which that can exceed FREE are *free*: the update
   does not determine the image along them, however small the residual is;
3. goes on to the least-squares image along the other axes and compares what is left of the residual with rounding. If
   more is left, damped steps follow, which stay where z is close to linear: they do not settle the axes that z hardly
   shows, so that there is no bound, but a rest that they leave as well means that no image near this one made the
   update in the way that the search models;
4. bounds the error by the distance to that image, plus SAFETY times the root mean square of the moves by rounding,
   plus the distance at which the images of a batch could not be told from their mean.

The bound is local and probabilistic: it holds where z is close to linear over the error that it states, for rounding
errors that resemble the drawn ones. It is not claimed beyond CEILING_DB. `benchmarks/inversion/exactness_study.py`
counts how often it is wrong.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from math import floor, isnan, log10, nan

import torch
from torch import Tensor

from r2f_ext.inversion.pixel_axes import EXPLAINED, FREE, SAFETY, DenseMap, EigenvectorAxes, ErrorAxes, PixelAxes
from r2f_ext.models.storage import storage_dtype
from r2f_ext.types import Reconstruction, Target

REPRODUCED = 1e-3  # relative residual below which an image reproduces its update, which alone proves nothing
EXACT_DB = 40.0  # least bound of an image that is called exact: errors of 1/100 of the pixel range, invisible
CEILING_DB = 60.0  # highest bound that is claimed: all bytes of an image are then right
SPARE = 0.05  # least share of z's numbers beyond the directions solved for: with fewer any image reproduces any update
DRAWS = 32  # of rounding errors: their root mean square is then known to an eighth
JITTER = 1e-4  # change of the pixels that gives another draw of the model's arithmetic errors
REFINEMENTS = 10  # steps towards the least-squares image
DAMPED = tuple(10.0**-k for k in range(4, 13))  # dampings, as shares of the trace of J^T J
HARDLY = 0.9  # ratio of the residual after a damped step to the one before, above which no other follows
PAIRS, STEP = 8, 1e-3  # random changes of the image, of this size per pixel, that show how z bends
PRECISE = 1e-12  # relative error of z that float64 arithmetic itself may leave


@dataclass(frozen=True)
class Bound:
    """What the update says of the image found for it.

    Attributes (NaN: not computed):
        db: the image's PSNR is at least this, in dB; NaN where axes are free or rounding does not explain the residual.
        free: number of axes in pixel space along which the update does not determine the image.
        misfit: residual of the least-squares image nearby, relative to the one that rounding leaves.
    """

    db: float = nan
    free: float = nan
    misfit: float = nan

    @property
    def exact(self) -> bool:
        """Whether it allows the word "exact"."""
        return self.free == 0 and self.db >= EXACT_DB and self.misfit <= EXPLAINED


@dataclass(frozen=True)
class Exactness:
    """Whether a reconstruction is the victim's own image, decided without the original.

    Attributes:
        exact: the error is bounded, at EXACT_DB or better, in all pixels.
        bound_db: the PSNR is at least this; None: there is no bound.
        free_directions: directions in pixel space that the update leaves free; None: not computed.
        words: "exact to 78 dB", "determined to 31 dB", "determined up to 365 directions", "not determined",
            "not exact: " and a reason.
    """

    exact: bool
    bound_db: float | None
    free_directions: int | None
    words: str


def exactness_of(found: Reconstruction, victim: int) -> Exactness:
    """What can be said of the image of one victim, from the figures that its route left in `per_victim`."""
    figure = {name: float(values[victim]) for name, values in found.per_victim.items()}
    bound, free, misfit, residual = (
        figure.get(key, nan) for key in ("bound_db", "free_directions", "misfit", "residual")
    )
    exact = figure.get("exact") == 1.0
    stopped = " where the time limit stopped the search" if figure.get("stopped") == 1.0 else ""
    known = None if isnan(bound) else bound, None if isnan(free) else int(free)
    if exact:
        words = f"exact to {floor(bound)} dB"
    elif found.doubt is not None:
        words = f"not exact: {found.doubt}"
    elif residual >= REPRODUCED and not misfit <= EXPLAINED:
        words = f"not exact: the residual is {residual:.1g}{stopped}"
    elif free > 0:
        words = f"determined up to {int(free)} directions"
    elif misfit > EXPLAINED:
        words = f"not exact: the residual is {residual:.1g}{stopped}, more than rounding explains"
    elif not isnan(bound):
        words = f"determined to {floor(bound)} dB"
    else:
        words = "not determined"
    return Exactness(exact, *known, words)


def storage_precision(factor: Tensor) -> torch.finfo:
    """The lowest-precision float dtype that represents every entry exactly: the dtype that the adapter was saved in."""
    return torch.finfo(storage_dtype([factor]))


def rounded(factor: Tensor, generator: torch.Generator) -> Tensor:
    """A factor that storage could have rounded to the given one: another draw of the rounding error, float64."""
    stored = storage_precision(factor)
    spacing = stored.eps * factor.double().abs().clamp_min(stored.smallest_normal)
    share = torch.rand(factor.shape, generator=generator, dtype=torch.float64).to(factor.device) - 0.5
    return factor.double() + spacing * share


def in_float64(target: Target) -> Target:
    """The same layers of a copy of the base in float64; the target itself where its base is in float64."""
    if all(each.dtype == torch.float64 for each in target.base.model.parameters()):
        return target
    return replace(target, base=replace(target.base, model=copy.deepcopy(target.base.model).double()))


def arithmetic_errors(rough: DenseMap, precise: DenseMap, image: Tensor, label: Tensor) -> Tensor:
    """Errors of z by the model's own arithmetic, [DRAWS, R] float64: `rough` is the map in the model's dtype."""
    generator = torch.Generator().manual_seed(0)
    jitter = (torch.rand(DRAWS, len(image), generator=generator, dtype=torch.float64) - 0.5).to(image.device)
    points = (image.double() + JITTER * jitter).to(image.dtype)
    return torch.cat(
        [rough(part, label).double() - precise(part.double(), label) for part in points.split(rough.directions)]
    )


def bound_error(
    precise: DenseMap,
    observed: Tensor,
    errors: Tensor,
    image: Tensor,
    label: Tensor,
    rough: DenseMap | None = None,
) -> Bound:
    """Bound the error of an image in all pixels, see the head of this module.

    Args:
        precise: the update map in float64.
        observed: [R] float64.
        errors: [n, R] float64, draws of the errors that rounding leaves in `observed`.
        image: [p] in [0, 1], the image found; label: of the images that it holds.
        rough: the map in the dtype of `image`, whose Jacobian is tried first; None: that of `precise` is taken.
    """
    point = image.double()
    pixels = None if rough is None else PixelAxes.of(rough, precise, image, label, errors)
    axes: ErrorAxes = pixels or EigenvectorAxes.of(precise, point, label)
    moves = axes.moves(errors).square().mean(0).sqrt()
    determined = axes.reliable & (SAFETY * moves < FREE)
    spare = 1 - int(determined.sum()) / len(observed)
    if spare < SPARE:
        return Bound(free=int((~determined).sum()))
    rounding = max(float(errors.norm(dim=1).square().mean().sqrt()), PRECISE * float(observed.norm()))
    expected = rounding * spare**0.5
    fit = _Fit(precise, observed, axes, determined, label, EXPLAINED * expected)
    nearby, residual = fit.by_full_steps(point)
    if not (full := residual <= EXPLAINED * expected):
        residual = min(residual, fit.by_damped_steps(point))
    misfit = residual / expected
    if misfit <= EXPLAINED:
        moves = moves * max(1.0, misfit)
    free = int((~(axes.reliable & (SAFETY * moves < FREE))).sum())
    if free or not full:
        return Bound(nan, free, misfit)
    error = (float((nearby - point).norm()) + SAFETY * float(moves.norm())) / len(point) ** 0.5
    error += _alike(precise, axes, point, label, EXPLAINED * expected)
    return Bound(min(CEILING_DB, -20 * log10(max(error, 1e-10))), 0, misfit)


def _alike(precise: DenseMap, axes: ErrorAxes, point: Tensor, label: Tensor, explained: float) -> float:
    """Root mean square error per pixel up to which a batch of two images cannot be told from a single image.

    The update of a batch of x + h and x - h differs from that of x by a term of second order in h. A single image near
    x reproduces a part of this term, and the rest stays unnoticed if its norm is at most `explained`. The worst of
    PAIRS random h counts.
    """
    generator = torch.Generator().manual_seed(2)
    shift = STEP * torch.randn(PAIRS, 1, len(point), generator=generator, dtype=torch.float64).to(point.device)
    bent = precise.together(point + torch.cat([shift, -shift], dim=1), label) - precise(point[None], label)
    moves = axes.moves(bent)
    rest = (axes.jacobian.sketched(bent) - axes.in_pixels(moves) @ axes.jacobian.rows.double()).norm(dim=1)
    growth = explained / rest.clamp_min(1e-300)  # of h, squared
    return float((STEP * growth.sqrt() + growth * moves.norm(dim=1) / len(point) ** 0.5).max())


@dataclass(frozen=True)
class _Fit:
    """Least squares of |z - observed| [R] near an image, along the `determined` axes; `enough`: residual to reach."""

    precise: DenseMap
    observed: Tensor
    axes: ErrorAxes
    determined: Tensor
    label: Tensor
    enough: float

    def by_full_steps(self, point: Tensor) -> tuple[Tensor, float]:
        """The image with the smallest residual |z - observed|, and its residual.

        Simplified Newton steps; they end when the residual is below `enough` for the second time or no longer falls.
        """
        best, least = point, float("inf")
        for _ in range(REFINEMENTS):
            error = self.precise(point[None], self.label) - self.observed
            residual = float(error.norm())
            if not residual < least:
                break
            settled, best, least = least < self.enough, point, residual
            if settled:
                break
            move = self.axes.moves(error)[0]
            point = point - self.axes.in_pixels(torch.where(self.determined, move, 0.0))
        return best, least

    def by_damped_steps(self, point: Tensor) -> float:
        """The smallest residual by steps of the damping that reduces it most, until it is below `enough` or hardly
        falls."""
        axes, error = self.axes.eigenvectors(), self.precise(point[None], self.label) - self.observed
        for _ in range(REFINEMENTS):
            before = error.norm()
            trials = point - axes.in_pixels(torch.where(self.determined, axes.moves(error, DAMPED), 0.0))
            errors = self.precise(trials, self.label) - self.observed
            best = int(errors.norm(dim=1).nan_to_num(nan=torch.inf).argmin())
            if not errors[best].norm() < before:
                break
            point, error = trials[best], errors[best, None]
            if error.norm() <= self.enough or error.norm() > HARDLY * before:
                break
        return float(error.norm())

"""How precisely an update determines the image that was found for it (docs/methods.md, 3f).

A small residual alone does not make an image the victim's: the update may not depend on all of the image, and an image
of another model (a batch, another label, another recipe) may nearly reproduce it. `bound_error` therefore

1. linearises the update map z at the image in *all* pixels: J = dz / dpixels, eigenvalues s_i^2 of J^T J; in float64,
   unless the model's own arithmetic is precise enough for the smallest s_i and no axis can be free (`_Pixels`);
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
from typing import Protocol

import torch
from torch import Tensor

from r2f_ext.linalg import precise_gram, smallest_eigenvalue
from r2f_ext.models.storage import storage_dtype
from r2f_ext.types import Reconstruction, Target

REPRODUCED = 1e-3  # relative residual below which an image reproduces its update, which alone proves nothing
EXACT_DB = 40.0  # least bound of an image that is called exact: errors of 1/100 of the pixel range, invisible
CEILING_DB = 60.0  # highest bound that is claimed: all bytes of an image are then right
FREE = 0.1  # length of a move, in units of the pixel range, from which on an axis counts as free
SAFETY = 3.0  # multiple of the root mean square move by rounding that the bound allows for: 9.5 dB
EXPLAINED = 3.0  # largest ratio of the residual that is left to the one expected of rounding
SPARE = 0.05  # least share of z's numbers beyond the directions solved for: with fewer any image reproduces any update
DRAWS = 32  # of rounding errors: their root mean square is then known to an eighth
JITTER = 1e-4  # change of the pixels that gives another draw of the model's arithmetic errors
REFINEMENTS = 10  # steps towards the least-squares image
DAMPED = tuple(10.0**-k for k in range(4, 13))  # dampings, as shares of the trace of J^T J
HARDLY = 0.9  # ratio of the residual after a damped step to the one before, above which no other follows
RELIABLE = 1e-13  # share of the trace of J^T J below which an eigenvalue is rounding; J: float64 rounded to float32
# Ratio of the smallest singular value of a Jacobian in the model's own arithmetic to the error of that arithmetic, both
# relative, from which on that Jacobian serves.
MARGIN = 5.0
PAIRS, STEP = 8, 1e-3  # random changes of the image, of this size per pixel, that show how z bends
PRECISE = 1e-12  # relative error of z that float64 arithmetic itself may leave
SKETCH = 4  # numbers kept of z per pixel; a random sketch of more is as good and bounds memory


class DenseMap(Protocol):
    """A map z from images to updates with a dense Jacobian: `update_map.UpdateMap` or `unrolled.UnrolledMap`.

    Attributes:
        directions: batch size of images, or of tangents.
    """

    target: Target
    directions: int

    def __call__(self, points: Tensor, label: Tensor, /) -> Tensor:
        """Points [n, p] in [0, 1], all of one label [1] -> [n, R]."""
        ...

    def together(self, batches: Tensor, label: Tensor, /) -> Tensor:
        """Updates of n victims that trained on batches [n, b, p] of one label [1] -> [n, R]."""
        ...

    def jacobian(self, point: Tensor, label: Tensor, basis: Tensor, /) -> Tensor:
        """dz along the columns of basis [p, q] at point [p]: [q, R]."""
        ...


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
    pixels = None if rough is None else _Pixels.of(rough, precise, image, label, errors)
    axes: _Axes = pixels or _Eigenvectors.of(precise, point, label)
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


def _alike(precise: DenseMap, axes: _Axes, point: Tensor, label: Tensor, explained: float) -> float:
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
class _Jacobian:
    """J at one image, sketched: rows [p, m] float32, one per pixel.

    Attributes:
        bucket, sign: the sketch, of z's R numbers.
    """

    rows: Tensor
    bucket: Tensor
    sign: Tensor

    @staticmethod
    def of(updates: DenseMap, point: Tensor, label: Tensor) -> _Jacobian:
        identity = torch.eye(len(point), dtype=point.dtype, device=point.device)
        size = updates(point[None], label).shape[1]
        bucket, sign = _sketch(size, SKETCH * len(point), point.device)
        sign = sign.to(point.dtype)
        parts = [
            _sketched(updates.jacobian(point, label, columns), bucket, sign).float()
            for columns in identity.split(updates.directions, dim=1)
        ]
        return _Jacobian(torch.cat(parts), bucket, sign.double())

    def sketched(self, rows: Tensor) -> Tensor:
        """Rows [n, R] float64 -> [n, m]."""
        return _sketched(rows, self.bucket, self.sign)

    def pulls(self, errors: Tensor) -> Tensor:
        """J^T r of errors of z [n, R]: [n, p] float64."""
        return (self.sketched(errors).float() @ self.rows.T).double()


class _Axes(Protocol):
    """Orthonormal axes of pixel space, and how far errors of z move the image along them."""

    @property
    def jacobian(self) -> _Jacobian: ...

    @property
    def reliable(self) -> Tensor:
        """bool [p]: axes along which the curvature of |z|^2 is more than rounding."""
        ...

    def moves(self, errors: Tensor) -> Tensor:
        """Moves of the image along the axes by errors of z [n, R]: [n, p] float64, infinite along unreliable axes."""
        ...

    def eigenvectors(self) -> _Eigenvectors:
        """The eigenvectors of the same J^T J. All are determined if all of these axes are."""
        ...

    def in_pixels(self, moves: Tensor) -> Tensor:
        """Moves along the axes [..., p] as changes of the pixels [..., p]."""
        ...


@dataclass(frozen=True)
class _Pixels:
    """The pixels as axes, for images that z determines in all directions: `factor` is the Cholesky factor of J^T J."""

    jacobian: _Jacobian
    factor: Tensor

    @staticmethod
    def of(rough: DenseMap, precise: DenseMap, image: Tensor, label: Tensor, errors: Tensor) -> _Pixels | None:
        """From the Jacobian in the model's own arithmetic, without an eigendecomposition; None if it is not precise
        enough, or if a direction could be free."""
        exact = precise(image.double()[None], label)
        noise = float((rough(image[None], label).double() - exact).norm() / exact.norm())
        jacobian = _Jacobian.of(rough, image, label)
        gram = precise_gram(jacobian.rows)
        factor, failed = torch.linalg.cholesky_ex(gram)
        least = 0.0 if bool(failed > 0) else smallest_eigenvalue(factor)
        if not least > max(RELIABLE, (MARGIN * noise) ** 2) * float(gram.trace()):
            return None
        axes = _Pixels(jacobian, factor)
        longest = float(torch.linalg.matrix_norm(axes.moves(errors), 2)) / len(errors) ** 0.5
        return axes if SAFETY * EXPLAINED * longest < FREE else None

    @property
    def reliable(self) -> Tensor:
        return torch.ones(len(self.factor), dtype=torch.bool, device=self.factor.device)

    def moves(self, errors: Tensor) -> Tensor:
        return torch.cholesky_solve(self.jacobian.pulls(errors).T, self.factor).T

    def eigenvectors(self) -> _Eigenvectors:
        return _Eigenvectors.of_gram(self.jacobian, self.factor @ self.factor.T)

    def in_pixels(self, moves: Tensor) -> Tensor:
        return moves


@dataclass(frozen=True)
class _Eigenvectors:
    """The eigenvectors of J^T J as axes.

    Attributes:
        curvature: [p] float64, ascending; directions: [p, p] float64, one axis a column.
    """

    jacobian: _Jacobian
    curvature: Tensor
    directions: Tensor

    @staticmethod
    def of(precise: DenseMap, point: Tensor, label: Tensor) -> _Eigenvectors:
        jacobian = _Jacobian.of(precise, point, label)
        return _Eigenvectors.of_gram(jacobian, precise_gram(jacobian.rows))

    @staticmethod
    def of_gram(jacobian: _Jacobian, gram: Tensor) -> _Eigenvectors:
        return _Eigenvectors(jacobian, *torch.linalg.eigh(gram))

    def eigenvectors(self) -> _Eigenvectors:
        return self

    @property
    def reliable(self) -> Tensor:
        return self.curvature > RELIABLE * self.curvature.sum()

    def moves(self, errors: Tensor, dampings: tuple[float, ...] = (0.0,)) -> Tensor:
        """See `_Axes`; with k dampings of J^T J, in shares of its trace: [k, p] for errors [1, R]."""
        damped = self.curvature + self.curvature.new_tensor(dampings)[:, None] * self.curvature.sum()
        return torch.where(self.reliable, self.jacobian.pulls(errors) @ self.directions / damped, torch.inf)

    def in_pixels(self, moves: Tensor) -> Tensor:
        return moves @ self.directions.T


def _sketch(size: int, kept: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where and with which sign each of `size` numbers is added (the count sketch: Clarkson and Woodruff, 2013)."""
    generator = torch.Generator().manual_seed(1)
    if size <= kept:
        return torch.arange(size, device=device), torch.ones(size, dtype=torch.float64, device=device)
    bucket = torch.randint(kept, (size,), generator=generator)
    sign = 2.0 * torch.randint(2, (size,), generator=generator).double() - 1
    return bucket.to(device), sign.to(device)


def _sketched(rows: Tensor, bucket: Tensor, sign: Tensor) -> Tensor:
    """Rows [n, R] float64 -> [n, m]."""
    return rows.new_zeros(len(rows), int(bucket.max()) + 1).index_add_(1, bucket, rows * sign)


@dataclass(frozen=True)
class _Fit:
    """Least squares of |z - observed| [R] near an image, along the `determined` axes; `enough`: residual to reach."""

    precise: DenseMap
    observed: Tensor
    axes: _Axes
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

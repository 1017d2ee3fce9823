"""Gauss-Newton without a dense Jacobian, for images or gradients that are too large for one.

J v is computed in forward mode over the reverse pass, J^T u by a second reverse pass. A Krylov space of J^T J, started
at J^T r, replaces the eigendecomposition: projected onto it, the corrections for all dampings (those of conjugate
gradients) and the next correction of the natural monotonicity test (see `newton`) are cheap. Directions outside the
space are left to the next point.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Protocol

import torch
from torch import Tensor

from r2f_ext.gpu import float32_products
from r2f_ext.inversion.newton import DAMPINGS, PRECISE, SOLVED, STALLED, Search
from r2f_ext.inversion.update_map import Subspace, UpdateMap

# One pass: a point [1, p] and its update [1, R] -> the next point and its update.
Move = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MatrixFreeConfig:
    """Stopping criteria and step control; see `GaussNewtonConfig`.

    Attributes:
        points: maximum number of points at which z is linearised.
        minutes: time after which z is linearised at no further point; None: no limit.
        steps: maximum number of steps per point.
        contraction: largest accepted ratio of the norm of the next correction to that of the present one.
        stalled: consecutive points without a reduction of the residual by a fifth after which the search ends.
        krylov: dimension of the Krylov space, the number of products with J and with J^T per point.
    """

    points: int = 14
    minutes: float | None = None
    steps: int = 8
    contraction: float = 0.75
    stalled: int = 4
    krylov: int = 200


class Coordinates(Protocol):
    """A linear map S from whitened coordinates to changes of an image."""

    def spread(self, u: Tensor) -> Tensor:
        """S u: [q] -> [c * h * w]."""
        ...

    def gather(self, slope: Tensor) -> Tensor:
        """S^T slope: [c * h * w] -> [q]."""
        ...


class ProxyCoordinates:
    """Coordinates from the covariance of the proxies, with a dense basis."""

    def __init__(self, subspace: Subspace) -> None:
        self.basis = subspace.basis

    def spread(self, u: Tensor) -> Tensor:
        return self.basis @ u

    def gather(self, slope: Tensor) -> Tensor:
        return self.basis.T @ slope


class SpectrumCoordinates:
    """Coordinates from the mean spectrum of natural images, amplitude ~ 1 / frequency (Field, 1987); any image size.

    S is a symmetric filter of every channel; a pixel's standard deviation is `deviation`.
    """

    def __init__(self, shape: torch.Size | tuple[int, ...], deviation: float = 0.25) -> None:
        self.shape = tuple(shape)
        height, width = self.shape[-2:]
        down, across = torch.fft.fftfreq(height, 1 / height), torch.fft.rfftfreq(width, 1 / width)
        amplitude = 1 / (1 + torch.hypot(down[:, None], across[None]))
        whole = 1 / (1 + torch.hypot(down[:, None], torch.fft.fftfreq(width, 1 / width)[None]))
        self.amplitude = amplitude * deviation / whole.square().mean().sqrt()

    def spread(self, u: Tensor) -> Tensor:
        waves = torch.fft.rfft2(u.view(self.shape)) * self.amplitude.to(u)
        return torch.fft.irfft2(waves, s=self.shape[-2:]).flatten()

    gather = spread


class AtPoint:
    """Products with the derivative J of z at one point; keeps the autograd graph of two passes."""

    def __init__(self, updates: UpdateMap, point: Tensor, label: Tensor) -> None:
        self.updates, self.label = updates, label
        self.point = point.detach().requires_grad_()
        self._value = updates.differentiable(self.point[None], label)[0]

    def forward(self, direction: Tensor) -> Tensor:
        """J direction: [c * h * w] -> [R]."""
        return self.updates.along(self.point.detach(), self.label, direction.to(self.point.dtype)[None])[0]

    def backward(self, rows: Tensor) -> Tensor:
        """J^T rows: [R] -> [c * h * w]."""
        (slope,) = torch.autograd.grad(self._value, self.point, rows, retain_graph=True)
        return slope


def krylov(product: Callable[[Tensor], Tensor], start: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Lanczos with full reorthogonalisation: Ritz values [k], ascending, and vectors [q, k] of a symmetric product.

    k <= dimension, and smaller if the Krylov space is exhausted.
    """
    basis = [start / start.norm()]
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    while True:
        image, space = product(basis[-1]), torch.stack(basis)
        diagonal.append(basis[-1] @ image)
        for _ in range(2):
            image = image - space.T @ (space @ image)
        length = image.norm()
        if len(basis) == min(dimension, len(start)) or length <= 1e-10 * diagonal[0].abs():
            break
        off_diagonal.append(length)
        basis.append(image / length)
    matrix = torch.diag(torch.stack(diagonal))
    if off_diagonal:
        matrix = matrix + torch.diag(torch.stack(off_diagonal), 1) + torch.diag(torch.stack(off_diagonal), -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0), space.T @ vectors


def run_search(
    update_of: Callable[[Tensor], Tensor],
    move: Move,
    observed: Tensor,
    start: Tensor,
    layers: int,
    config: MatrixFreeConfig,
) -> Search:
    """Take passes from start [p] in [0, 1] to the image whose update is observed [R]; the best point is returned.

    Args:
        layers: number of layers, whose updates of norm 1 are concatenated in `observed`.
    """
    began, limit = time.perf_counter(), inf if config.minutes is None else 60 * config.minutes

    def misfit(value: Tensor) -> float:
        return float((value - observed).norm()) / layers**0.5

    point, value = start[None], update_of(start[None])
    first = residual = lowest = misfit(value)
    best, least, count, since, stopped = point, residual, 0, 0, False
    while least > SOLVED and count < config.points and since < config.stalled and not (least < PRECISE and since == 2):
        if stopped := time.perf_counter() - began >= limit:
            break
        point, value = move(point, value)
        residual = misfit(value)
        count += 1
        image = point.clamp(0, 1)
        if (reached := misfit(update_of(image))) < least:  # solutions outside the box are not the image
            best, least = image, reached
        lowest, since = (residual, 0) if residual < STALLED * lowest else (lowest, since + 1)
    return Search(best[0], least, first, count, stopped, seconds=time.perf_counter() - began)


@float32_products()
def search_matrix_free(
    updates: UpdateMap,
    observed: Tensor,
    start: Tensor,
    label: Tensor,
    coordinates: Coordinates,
    config: MatrixFreeConfig | None = None,
) -> Search:
    """The image whose update is observed, from products with J and J^T alone.

    Like the part of `gauss_newton.search` near the image, but every step is clamped to [0, 1], without clouds or
    restarts. The full gradient G of a large layer can be observed as an update, too: with a random A, G A^T holds r
    numbers per row, which suffice as long as R is well above the number of pixels.

    Args:
        observed: [R], see `flat_units`.
        start: [c * h * w] in [0, 1]; label: [1].
    """
    settings, layers = config or MatrixFreeConfig(), len(updates.target.layers)

    def update_of(images: Tensor) -> Tensor:
        return updates(images, label)

    def move(point: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Damped steps within a Krylov space of the point."""
        here = AtPoint(updates, point[0], label)
        local = KrylovLocal(here, coordinates, (value - observed)[0], settings.krylov)
        return damped_steps(local, update_of, observed, point, value, settings, SOLVED * layers**0.5)

    return run_search(update_of, move, observed, start, layers, settings)


def damped_steps(
    local: KrylovLocal,
    update_of: Callable[[Tensor], Tensor],
    observed: Tensor,
    point: Tensor,
    value: Tensor,
    config: MatrixFreeConfig,
    solved: float,
) -> tuple[Tensor, Tensor]:
    """Steps with one Jacobian, from point [1, p] with update [1, R]; the last of both.

    Each step uses the smallest damping whose next correction is shorter than `contraction` times the present one. If
    there is none, the first step uses the damping with the smallest ratio, and a later step ends the descent.

    Args:
        solved: |z - z*| below which the steps end.
    """
    damped = [local.curvature + share * local.curvature[-1] for share in reversed(DAMPINGS)]  # the least damped first
    pull = local.pull((value - observed)[0])
    for step in range(config.steps):
        best = None
        for curvature in damped:
            trial = local.moved(point, pull / curvature)
            reached = update_of(trial)
            pulled = local.pull((reached - observed)[0])
            ratio = float((pulled / curvature).norm() / (pull / curvature).norm())
            if isfinite(ratio) and (best is None or ratio < best[0]):
                best = ratio, trial, reached, pulled
            if ratio < config.contraction:
                break
        if best is None or (step > 0 and not best[0] < config.contraction):
            break
        _, point, value, pull = best
        if float((value - observed).norm()) < solved:
            break
    return point, value


class KrylovLocal:
    """J at one point by its products, within a Krylov space of S^T J^T J S started at the residual's pull.

    Attributes:
        curvature: [k] float64, >= 0, ascending: J^T J along the axes of that space, in which it is diagonal.
    """

    def __init__(self, here: AtPoint, coordinates: Coordinates, residual: Tensor, dimension: int) -> None:
        self.here, self.coordinates, self.dtype = here, coordinates, residual.dtype
        self.curvature, self.axes = krylov(self._product, self._gathered(residual), dimension)

    def _gathered(self, rows: Tensor) -> Tensor:
        return self.coordinates.gather(self.here.backward(rows)).double()  # S^T J^T r

    def _product(self, u: Tensor) -> Tensor:
        return self._gathered(self.here.forward(self.coordinates.spread(u.to(self.dtype))))

    def pull(self, error: Tensor) -> Tensor:
        """J^T r along the axes: [R] -> [k] float64."""
        return self._gathered(error) @ self.axes

    def moved(self, point: Tensor, correction: Tensor) -> Tensor:
        """Subtract a correction along the axes [k] from the point [1, p]."""
        return (point - self.coordinates.spread((self.axes @ correction).to(point.dtype))).clamp(0, 1)

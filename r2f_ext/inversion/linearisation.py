"""Statistical linearisation: the update map is replaced by its regression over a cloud of images (docs/methods.md, 3f).

Far from the image the derivative is a poor model: the map is nonlinear over the distance to the image. A regression
over a cloud as wide as that distance averages over the nonlinearity, and its minimum error estimate of the image from
the observed update is the next point (iterated posterior linearisation: Garcia-Fernandez et al., IEEE Trans. Signal
Processing 63(20), 2015). The size of the cloud follows the misfit of the point but shrinks slowly: the misfit falls
faster than the distance, to which it is insensitive along most directions. A part of the cloud's shape is the error
covariance of the last regression, so that the next cloud samples the directions still undetermined. A partly Gaussian
kernel models the remaining nonlinearity within the cloud.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from r2f_ext.kernel_solver import fit_by_leave_one_out
from r2f_ext.linalg import gram

DAMPINGS = tuple(10.0 ** (-k / 2) for k in range(4, 19))  # shares of the kernel matrix's largest eigenvalue
GAUSSIAN, WIDTH = 0.2, 0.25  # the Gaussian share of the kernel, and its exponent at the mean squared distance
SAMPLES = 1.5  # images per direction by default; with fewer the leave-one-out errors do not determine the damping
PROBES = 48  # images that determine the cloud's size
SIZES = tuple(2.0**k for k in range(-3, 7))  # tried until the probes' misfit is the point's
EXPECTED = 2 / 3  # weight of the expected covariance in the next cloud's shape; the rest is the last errors' covariance
SHRINKS = 0.85  # smallest ratio of a cloud's size to that of the previous cloud
SHORTER = (1.0, 0.5, 0.25)  # trial step lengths, relative to the regression's estimate

UpdateOf = Callable[[Tensor], Tensor]  # images [n, p] -> updates [n, R]


@dataclass(frozen=True)
class Axes:
    """Orthonormal directions [p, q] that images vary along, and along these the covariance [q, q], float64, that the
    distance to the image is expected to have."""

    directions: Tensor
    covariance: Tensor

    @staticmethod
    def of(basis: Tensor, errors: Tensor | None = None) -> Axes:
        """From orthogonal columns [p, q], each as long as the proxies' standard deviation along it.

        The covariance is the proxies' own; with errors [n, p] of the start's route, half theirs and half its shape.
        """
        deviation = basis.norm(dim=0)
        directions = basis / deviation
        covariance = torch.diag(deviation.double().square())
        if errors is not None:
            covariance = _mixed(torch.cov((errors @ directions).double().T), covariance, 0.5)
        return Axes(directions, covariance)


def _mixed(one: Tensor, other: Tensor, share: float) -> Tensor:
    """share * one + (1 - share) * other, covariances [q, q], the other's trace made that of the one."""
    return share * one + (1 - share) * other * (one.trace() / other.trace().clamp_min(1e-300))


@dataclass(frozen=True)
class Cloud:
    """Where a regression samples: covariance `shape` [q, q] along the axes, float64, its last size, and how many
    images it takes per axis."""

    shape: Tensor
    size: float = 0.0
    samples: float = SAMPLES


def linearised_step(
    update_of: UpdateOf,
    observed: Tensor,
    point: Tensor,
    value: Tensor,
    axes: Axes,
    cloud: Cloud,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Cloud]:
    """One regression over a cloud round point [1, p] in [0, 1], whose update is value [1, R]; observed [R].

    Returns:
        (point, value, cloud): the estimate, or the nearest of some points on the way to it that lowers the misfit, or
        the point as it was; and the next cloud.
    """
    shape = cloud.shape
    count = int(cloud.samples * len(shape)) + 1
    draws = torch.randn(count, len(shape), generator=generator, dtype=torch.float64).to(shape.device)
    variance, principal = torch.linalg.eigh(shape)
    shifts = ((draws * variance.clamp_min(0).sqrt()) @ principal.T).to(point.dtype) @ axes.directions.T
    size = max(_size(update_of, float((value - observed).norm()), point, value, shifts[:PROBES]), SHRINKS * cloud.size)
    images = (point + size * shifts).clamp(0, 1)
    found, errors = _regress(update_of(images), (images - point) @ axes.directions, observed)
    trials = (point + torch.tensor(SHORTER).to(found)[:, None] * (found @ axes.directions.T)).clamp(0, 1)
    points, values = torch.cat([point, trials]), torch.cat([value, update_of(trials)])
    best = int((values - observed).norm(dim=1).nan_to_num(nan=torch.inf).argmin())
    covariance = _mixed(axes.covariance, torch.cov(errors.T), EXPECTED)
    return points[best, None], values[best, None], Cloud(covariance, size, cloud.samples)


def _size(update_of: UpdateOf, misfit: float, point: Tensor, value: Tensor, shifts: Tensor) -> float:
    """The factor at which the median misfit of images shifted by `shifts` [n, p] from the point is the point's own."""
    below, reached_below = 0.0, 0.0
    for size in SIZES:
        reached = float((update_of((point + size * shifts).clamp(0, 1)) - value).norm(dim=1).quantile(0.5))
        if reached > misfit:
            if below == 0:
                break
            # Interpolate as if the misfit were a power of the size.
            share = log(misfit / reached_below) / log(reached / reached_below)
            return below * (size / below) ** share
        below, reached_below = size, max(reached, 1e-300)
    return size


def _regress(updates: Tensor, offsets: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel ridge with a constant from updates [n, R] to offsets [n, q], damped by leave-one-out error.

    Returns:
        (offset [q] for `observed`, leave-one-out errors [n, q] float64).
    """
    middle = offsets.mean(0)
    kernel, similar = _kernels(updates, observed)
    dual, errors = fit_by_leave_one_out(kernel, (offsets - middle).double(), DAMPINGS)
    return middle + (similar @ dual).to(middle.dtype), errors


def _kernels(updates: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel of updates [n, R] with one another [n, n] and with `observed` [n], features centred on the n; float64."""
    mean = updates.mean(0)
    centred, query = updates - mean, observed - mean
    inner, products = gram(centred).double(), (centred @ query).double()
    squares = inner.diagonal()
    unit = squares.mean()  # half the mean squared distance
    kernel = _kernel(inner, squares[:, None] + squares - 2 * inner, unit)
    similar = _kernel(products, squares + query.double().square().sum() - 2 * products, unit)
    means = kernel.mean(0)
    return kernel - means - means[:, None] + means.mean(), similar - similar.mean() - means + means.mean()


def _kernel(products: Tensor, distances: Tensor, unit: Tensor) -> Tensor:
    return (1 - GAUSSIAN) * products / unit + GAUSSIAN * torch.exp(-WIDTH / 2 * distances / unit)

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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from r2f_ext.kernel_solver import fit_by_leave_one_out
from r2f_ext.linalg import gram
from r2f_ext.pairs.memory import budget

DAMPINGS = tuple(10.0 ** (-k / 2) for k in range(4, 19))  # shares of the kernel matrix's largest eigenvalue
GAUSSIAN, WIDTH = 0.2, 0.25  # the Gaussian share of the kernel, and its exponent at the mean squared distance
SAMPLES = 1.5  # images per direction by default; with fewer the leave-one-out errors do not determine the damping
PROBES = 48  # images that determine the cloud's size
SIZES = tuple(2.0**k for k in range(-3, 7))  # tried until the probes' update changes by more than the point's misfit
EXPECTED = 2 / 3  # weight of the expected covariance in the next cloud's shape; the rest is the last errors' covariance
SHRINKS = 0.85  # smallest ratio of a cloud's size to that of the previous cloud
SHORTER = (1.0, 0.5, 0.25)  # trial step lengths, relative to the regression's estimate

UpdateOf = Callable[[Tensor, Tensor], Tensor]  # images [n, p], the victim of each int64 [n] -> updates [n, R]


@dataclass(frozen=True)
class Axes:
    """Orthonormal directions [p, q] along which images vary, and the expected covariance [q, q], float64, of the
    distance to the image along them."""

    directions: Tensor
    covariance: Tensor

    @staticmethod
    def of(basis: Tensor, errors: Tensor | None = None) -> Axes:
        """From orthogonal columns [p, q], each as long as the proxies' standard deviation along it.

        The covariance is that of the proxies. With errors [n, p] of the start's route, it is the errors' covariance,
        averaged with the proxies' covariance scaled to the same trace.
        """
        deviation = basis.norm(dim=0)
        directions = basis / deviation
        covariance = torch.diag(deviation.double().square())
        if errors is not None:
            covariance = _mixed(torch.cov((errors @ directions).double().T), covariance, 0.5)
        return Axes(directions, covariance)


def _mixed(one: Tensor, other: Tensor, share: float) -> Tensor:
    """share * one + (1 - share) * other for covariances [q, q], with `other` scaled to the trace of `one`."""
    return share * one + (1 - share) * other * (one.trace() / other.trace().clamp_min(1e-300))


@dataclass(frozen=True)
class Cloud:
    """Where a regression samples: covariance `shape` [q, q] along the axes, float64, its last size, and how many
    images it takes per axis."""

    shape: Tensor
    size: float = 0.0
    samples: float = SAMPLES


def linearised_steps(
    update_of: UpdateOf,
    observed: Tensor,
    points: Tensor,
    values: Tensor,
    axes: Sequence[Axes],
    clouds: Sequence[Cloud],
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor, list[Cloud]]:
    """One regression of each of V victims over a cloud round its point [p] in [0, 1], whose update is value [R].

    Args:
        observed, values: [V, R]; points: [V, p].
        axes, clouds, generators: of each victim.

    Returns:
        (points, values, clouds): per victim the candidate with the lowest misfit, out of the estimate, two points on
        the way to it and the unchanged point; and the next cloud.

    Raises:
        R2FError: no damping gives finite leave-one-out errors.
    """
    shifts = [
        drawn(own, cloud.shape, int(cloud.samples * len(cloud.shape)) + 1, generator, points)
        for own, cloud, generator in zip(axes, clouds, generators, strict=True)
    ]
    probes = torch.stack([each[: min(PROBES, *map(len, shifts))] for each in shifts])
    misfits = (values - observed).norm(dim=1).tolist()
    sizes = [
        max(size, SHRINKS * cloud.size)
        for size, cloud in zip(_sizes(update_of, misfits, points, values, probes), clouds, strict=True)
    ]
    lengths = torch.tensor(SHORTER, dtype=points.dtype, device=points.device)[:, None]
    trials, after = [], []
    for victim, (images, updates) in enumerate(_mapped(update_of, points, values, sizes, shifts)):
        own, cloud = axes[victim], clouds[victim]
        found, errors = _regress(updates, (images - points[victim]) @ own.directions, observed[victim])
        trials.append((points[victim] + lengths * (found @ own.directions.T)).clamp(0, 1))
        shape = _mixed(own.covariance, torch.cov(errors.T), EXPECTED)
        after.append(Cloud(shape, sizes[victim], cloud.samples))
    tried = update_of(torch.cat(trials), _owners(len(points), len(SHORTER), points.device))
    candidates = torch.cat([points[:, None], torch.stack(trials)], 1)
    reached = torch.cat([values[:, None], tried.view(len(points), len(SHORTER), -1)], 1)
    best = (reached - observed[:, None]).norm(dim=2).nan_to_num(nan=torch.inf).argmin(1)
    rows = torch.arange(len(points), device=points.device)
    return candidates[rows, best], reached[rows, best], after


def drawn(axes: Axes, covariance: Tensor, count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Random shifts [count, p] of this covariance [q, q] along the axes, in the dtype of `like`."""
    draws = torch.randn(count, len(covariance), generator=generator, dtype=torch.float64, device=generator.device)
    root = torch.linalg.cholesky(covariance)
    return (draws.to(root.device) @ root.T).to(like.dtype) @ axes.directions.T


def _owners(victims: int, each: int, device: torch.device) -> Tensor:
    """0, 0, ..., 1, 1, ...: `each` times every victim, int64."""
    return torch.arange(victims, device=device).repeat_interleave(each)


def clouds_together(device: torch.device, each: int) -> int:
    """How many clouds, with updates of `each` bytes, are mapped at once: on a GPU as many as fit, so that its passes
    are full; one on a CPU, several of whose passes it fills."""
    return max(1, budget(device) // (3 * each)) if device.type == "cuda" else 1  # updates exist twice for a moment


def _mapped(
    update_of: UpdateOf, points: Tensor, values: Tensor, sizes: Sequence[float], shifts: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per victim the images of its cloud [n, p], and their updates [n, R]; some victims' clouds are mapped at once."""
    few = clouds_together(points.device, max(map(len, shifts)) * values[0].nbytes)
    for first in range(0, len(points), few):
        victims = range(first, min(first + few, len(points)))
        images = [(points[victim] + sizes[victim] * shifts[victim]).clamp(0, 1) for victim in victims]
        owners = [
            torch.full((len(own),), victim, device=own.device) for victim, own in zip(victims, images, strict=True)
        ]
        updates = update_of(torch.cat(images), torch.cat(owners))
        yield from zip(images, updates.split([*map(len, images)]), strict=True)


def _sizes(
    update_of: UpdateOf, misfits: Sequence[float], points: Tensor, values: Tensor, shifts: Tensor
) -> list[float]:
    """Per victim the factor on `shifts` [V, n, p] at which the median change of the update, for images shifted from the
    victim's point, equals the point's misfit."""
    below: list[tuple[float, float]] = [(0.0, 0.0)] * len(points)  # largest size known to be too small; its change
    found: list[float | None] = [None] * len(points)
    for size in SIZES:
        open_ones = [victim for victim, known in enumerate(found) if known is None]
        if not open_ones:
            break
        rows = torch.tensor(open_ones, device=points.device)
        images = (points[rows, None] + size * shifts[rows]).clamp(0, 1)
        moved = update_of(images.flatten(0, 1), rows.repeat_interleave(shifts.shape[1]))
        lengths = (moved.view(len(rows), shifts.shape[1], -1) - values[rows, None]).norm(dim=2)
        for victim, reached in zip(open_ones, lengths.quantile(0.5, dim=1).tolist(), strict=True):
            if reached > misfits[victim]:
                found[victim] = _between(*below[victim], size, reached, misfits[victim])
            else:
                below[victim] = size, max(reached, 1e-300)
    return [SIZES[-1] if known is None else known for known in found]


def _between(low: float, reached_low: float, high: float, reached_high: float, wanted: float) -> float:
    """Interpolate as if the misfit were a power of the size; returns `high` if there is no lower size."""
    if low == 0:
        return high
    return low * (high / low) ** (log(wanted / reached_low) / log(reached_high / reached_low))


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

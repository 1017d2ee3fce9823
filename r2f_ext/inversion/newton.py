"""What the dense and the matrix-free Gauss-Newton searches share: damped steps at one point, and the loop over points.

A damping is chosen anew for every step by the *natural* monotonicity test (Deuflhard, Newton Methods for Nonlinear
Problems, 2004, section 4.3): a step is good if it shrinks the next correction (J^T J + m I)^-1 J^T r, not the residual.
The residual is dominated by a few steep directions, and a search that insists on its decrease stalls in their curved
valleys. Several such steps are taken with one Jacobian, as long as they contract (simplified Newton): a Jacobian costs
a thousand times what a step does.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction

DAMPINGS = tuple(10.0**-k for k in range(2, 14))  # shares of J^T J's largest eigenvalue
SOLVED = 1e-5  # relative residual below which float32 holds no more information
EXACT = 1e-3  # relative residual of an image, its pixels in [0, 1], that is the victim's own
PRECISE = 1e-4  # relative residual below which a search that no longer improves has reached float32's precision
FOLLOWED = 0.03  # share of the start's residual below which an image that is not exact is preferred to the start
STALLED = 0.8  # share of the lowest residual so far that a pass must get below to count as an improvement

UpdateOf = Callable[[Tensor], Tensor]  # images [n, p] -> updates [n, R]


@dataclass(frozen=True)
class Search:
    """How one victim's search ended.

    Attributes:
        image: [c * h * w] in [0, 1], from the point of least residual.
        residual: |z(x) - z*| over the square root of the number of layers: 0 for the victim's own image, about 1 for
            a stranger's.
        start_residual: the same at the start.
        passes: how many were taken.
    """

    image: Tensor
    residual: float
    start_residual: float
    passes: int

    @property
    def exact(self) -> bool:
        """Whether the image is the victim's, decided without the original: its update is the observed one."""
        return self.residual < EXACT

    @property
    def followed(self) -> bool:
        """Whether the image is to be preferred to the start."""
        return self.residual < max(EXACT, FOLLOWED * self.start_residual)


class Local(Protocol):
    """z linearised at one point, in axes in which J^T J is diagonal.

    Attributes:
        curvature: [k] float64, >= 0, ascending: J^T J along the axes.
        batch_size: dampings that are tried at once.
    """

    curvature: Tensor
    batch_size: int

    def pull(self, errors: Tensor) -> Tensor:
        """J^T r along the axes: [n, R] -> [n, k] float64."""
        ...

    def moved(self, point: Tensor, correction: Tensor) -> Tensor:
        """The point [1, p] less corrections along the axes [n, k] -> [n, p]."""
        ...


class Steps(ABC):
    """How a search moves from point to point."""

    @abstractmethod
    def move(self, point: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One pass from point [1, p] with update [1, R]: the next of both."""

    def judge(self, before: float, residual: float) -> None:  # noqa: B027
        """Called with the relative residuals before and after a pass; at the start the first is infinite."""

    def begin_again(self) -> bool:
        """Called when passes no longer improve: whether another search from the start can differ."""
        return False


def run_search(
    update_of: UpdateOf,
    steps: Steps,
    observed: Tensor,
    start: Tensor,
    layers: int,
    passes: int,
    patience: int,
    announce: Callable[[float], None] = lambda residual: None,
) -> Search:
    """Follow `steps` from start [p] in [0, 1] to the image whose update is observed [R]; the best point is returned.

    Args:
        layers: whose updates, each of norm 1, stand side by side in `observed`.
        passes: at most; patience: passes without an improvement after which the search begins again or ends.
        announce: called with the lowest relative residual after each pass.
    """

    def misfit(value: Tensor) -> float:
        return float((value - observed).norm()) / layers**0.5

    beginning = start[None], update_of(start[None])
    point, value = beginning
    first = residual = lowest = misfit(value)
    best, least, count, since = point, residual, 0, 0
    steps.judge(inf, first)
    while least > SOLVED and count < passes:
        before = residual
        point, value = steps.move(point, value)
        residual = misfit(value)
        count += 1
        image = point.clamp(0, 1)
        if (reached := misfit(update_of(image))) < least:  # solutions outside the box are not the image
            best, least = image, reached
        announce(least)
        lowest, since = (residual, 0) if residual < STALLED * lowest else (lowest, since + 1)
        if least < PRECISE and since == 2:
            break
        if since < patience:
            steps.judge(before, residual)
        elif steps.begin_again():
            point, value = beginning
            residual = lowest = first
            since = 0
        else:
            break
    return Search(best[0], least, first, count)


def descend(
    local: Local,
    update_of: UpdateOf,
    observed: Tensor,
    point: Tensor,
    value: Tensor,
    steps: int,
    contraction: float,
    solved: float,
) -> tuple[Tensor, Tensor]:
    """Damped steps with one Jacobian, from point [1, p] with update [1, R]; the last of both.

    Of the dampings whose next correction is less than `contraction` of the present one, the smallest is taken; where
    there is none, the first step takes the damping of the smallest ratio, and a later one ends the descent.

    Args:
        steps: at most; solved: |z - z*| that ends the descent.
    """
    damped = torch.stack([local.curvature + share * local.curvature[-1] for share in reversed(DAMPINGS)])
    pull = local.pull(value - observed)
    for step in range(steps):
        tried: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for part in damped.split(local.batch_size):  # the least damped first
            trials = local.moved(point, pull / part)
            values = update_of(trials)
            pulls = local.pull(values - observed)
            ratio = (pulls / part).norm(dim=1) / (pull / part).norm(dim=1)
            tried.append((ratio.nan_to_num(nan=torch.inf), trials, values, pulls))
            if bool((ratio < contraction).any()):
                break
        ratios, points, values, pulls = (torch.cat(parts) for parts in zip(*tried, strict=True))
        good = (ratios < contraction).nonzero().flatten()
        if len(good) == 0 and (step > 0 or not bool(ratios.isfinite().any())):
            break
        chosen = int(good[0]) if len(good) else int(ratios.argmin())
        point, value, pull = points[chosen, None], values[chosen, None], pulls[chosen, None]
        if float((value - observed).norm()) < solved:
            break
    return point, value


def dense_jacobian(
    tangents: Callable[[Tensor], Tensor], basis: Tensor, directions: int, shape: tuple[int, ...]
) -> Tensor:
    """dz along the columns of basis [p, q], some at a time: [q, R].

    Args:
        tangents: directions [directions, *shape] -> [directions, R]; traced for one shape, so passes are padded.
    """
    columns = basis.shape[1]
    rows = F.pad(basis.T, (0, 0, 0, -columns % directions)).unflatten(1, shape)
    return torch.cat([tangents(part) for part in rows.split(directions)])[:columns]


def search_each(
    route: str, start: Reconstruction, find: Callable[[int, Tensor, Tensor], Search], advance: Advance
) -> Reconstruction:
    """One search per victim -> images: the search's where it ended exactly or far below the start, else the start's.

    Args:
        start: images [V, c, h, w] in [0, 1] and labels [V] that the searches begin from.
        find: (victim, start point [c * h * w], label [1]) -> Search.
        advance: called with 1 after each victim.

    Returns:
        `per_victim` holds `residual`, `start_residual`, `exact` (1 or 0) and `passes`; `details` how many are exact.

    Raises:
        R2FError: the start has no labels.
    """
    began = time.perf_counter()
    if start.labels is None:
        raise R2FError(f"{route} needs labels: start it from a route that finds them.")
    images, searches = [], []
    for victim, (image, label) in enumerate(zip(start.images, start.labels, strict=True)):
        found = find(victim, image.flatten(), label[None])
        searches.append(found)
        images.append(found.image.view_as(image) if found.followed else image)
        advance(1)
    per_victim = {
        key: torch.tensor([float(getattr(one, key)) for one in searches], dtype=torch.float64)
        for key in ("residual", "start_residual", "exact", "passes")
    }
    exact = int(per_victim["exact"].sum())
    why = (
        f"Gauss-Newton on the update itself: {exact} of {len(images)} images reproduce their update to "
        f"{EXACT:g} and are exact"
    )
    seconds, details = time.perf_counter() - began, {"exact": float(exact)}
    return Reconstruction(route, torch.stack(images), start.labels, why, seconds, details, per_victim=per_victim)

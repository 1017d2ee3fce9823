"""Damped steps and the outer loop of the dense and the matrix-free Gauss-Newton search (docs/methods.md, 3f).

The damping of every step is chosen by the *natural* monotonicity test (Deuflhard, Newton Methods for Nonlinear
Problems, 2004, section 4.3): a step is good if it shrinks the next correction (J^T J + m I)^-1 J^T r, not the residual.
The residual is dominated by a few steep directions, and a search that requires it to decrease stalls in their curved
valleys. Several steps use the same Jacobian while they contract (simplified Newton), because a Jacobian costs about a
thousand times as much as a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.inversion.exactness import REPRODUCED

DAMPINGS = tuple(10.0**-k for k in range(2, 14))  # relative to J^T J's largest eigenvalue
SOLVED = 1e-5  # relative residual below which float32 holds no more information
PRECISE = 1e-4  # relative residual below which a search that no longer improves has reached float32's precision
IMPROVED = (
    0.03  # ratio to the start's residual below which an image that does not reproduce its update replaces the start
)
STALLED = 0.8  # ratio to the lowest residual so far below which a pass counts as an improvement

UpdateOf = Callable[[Tensor], Tensor]  # images [n, p] -> updates [n, R]
# One pass: a point [1, p] and its update [1, R] -> the next point and its update.
Move = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Search:
    """The result of one victim's search.

    Attributes:
        image: [c * h * w] in [0, 1], the point with the lowest residual.
        residual: |z(x) - z*| over the square root of the number of layers: 0 where the image's update is the observed
            one, about 1 for an unrelated image. It does not say whether another image has the same update.
        start_residual: the same at the start.
        passes: number of passes taken.
        stopped: the time limit ended it.
        seconds: time of its passes; that of a pass that several victims take together is divided among them.
    """

    image: Tensor
    residual: float
    start_residual: float
    passes: int
    stopped: bool = False
    seconds: float = 0.0

    @property
    def improved(self) -> bool:
        """Whether the image should replace the start."""
        return self.residual < max(REPRODUCED, IMPROVED * self.start_residual)


class Local(Protocol):
    """z linearised at one point, in axes in which J^T J is diagonal.

    Attributes:
        curvature: [k] float64, >= 0, ascending: J^T J along the axes.
        batch_size: number of dampings tried in one batch.
    """

    curvature: Tensor
    batch_size: int

    def pull(self, errors: Tensor) -> Tensor:
        """J^T r along the axes: [n, R] -> [n, k] float64."""
        ...

    def moved(self, point: Tensor, correction: Tensor) -> Tensor:
        """Subtract corrections along the axes [n, k] from the point [1, p]: [n, p]."""
        ...


def run_search(
    update_of: UpdateOf, move: Move, observed: Tensor, start: Tensor, layers: int, passes: int, patience: int
) -> Search:
    """Take passes from start [p] in [0, 1] to the image whose update is observed [R]; the best point is returned.

    Args:
        layers: number of layers, whose updates of norm 1 are concatenated in `observed`.
        passes: maximum number of passes.
        patience: passes without an improvement after which the search ends.
    """
    began = time.perf_counter()

    def misfit(value: Tensor) -> float:
        return float((value - observed).norm()) / layers**0.5

    point, value = start[None], update_of(start[None])
    first = residual = lowest = misfit(value)
    best, least, count, since = point, residual, 0, 0
    while least > SOLVED and count < passes and since < patience and not (least < PRECISE and since == 2):
        point, value = move(point, value)
        residual = misfit(value)
        count += 1
        image = point.clamp(0, 1)
        if (reached := misfit(update_of(image))) < least:  # solutions outside the box are not the image
            best, least = image, reached
        lowest, since = (residual, 0) if residual < STALLED * lowest else (lowest, since + 1)
    return Search(best[0], least, first, count, seconds=time.perf_counter() - began)


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

    Each step uses the smallest damping whose next correction is shorter than `contraction` times the present one. If
    there is none, the first step uses the damping with the smallest ratio, and a later step ends the descent.

    Args:
        steps: maximum number of steps.
        solved: |z - z*| below which the descent ends.
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
    """dz along the columns of basis [p, q], in batches: [q, R].

    Args:
        tangents: directions [directions, *shape] -> [directions, R]; traced for one shape, so the last batch is padded.
    """
    columns = basis.shape[1]
    rows = F.pad(basis.T, (0, 0, 0, -columns % directions)).unflatten(1, shape)
    return torch.cat([tangents(part) for part in rows.split(directions)])[:columns]

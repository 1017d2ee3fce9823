"""The two passes of a Gauss-Newton search that descend along the misfit (docs/methods.md, 3f): of images, and of images
whose patches are free to change places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from r2f_ext.inversion.linearisation import Axes
from r2f_ext.inversion.preconditioned import Expected, annealed_descent, preconditioned_descent
from r2f_ext.inversion.task import Task
from r2f_ext.inversion.update_map import onto_span
from r2f_ext.linalg import gram, precise_gram

# (damping, evaluations) of the descents with free positions, and of those from the images that come of them.
FREED_STAGES, PLACED_STAGES = ((1e-5, 400), (1e-6, 800)), ((1e-4, 200), (1e-5, 200))
# A pass with free positions descends until its residual is this fraction of the one at which it began, and small enough
# for Newton steps (`Task.handed_over`): a nearly correct order of the patches already fits to 1e-3 or less.
ELSEWHERE = 0.05
# Victims with free positions at a time on a CPU and on a GPU: each needs several matrices of the size of J^T J, about
# 0.5 GB on the embedded base.
FREE_TOGETHER, FREE_ON_GPU = 4, 32


def descents(
    task: Task, rows: Tensor, points: Tensor, starts: Tensor, dampings: Tensor, axes: Sequence[Axes]
) -> tuple[Tensor, Tensor]:
    """Descent of the victims `rows` from points [n, p], pulled towards their starts; pixels may leave [0, 1].

    Args:
        starts: [n, p], of the searches; dampings: [n] float64, see `preconditioned_descent`; axes: of each victim.

    Returns:
        Points [n, p] and the values [n, R] there.
    """
    covariances = torch.stack([own.covariance for own in axes])
    reached = annealed_descent(
        lambda images, places: task.slopes_of(images, rows[places]),
        Expected.of_covariances(starts, axes[0].directions, covariances),
        points,
        _grams(task, rows, points),
        task.subspace.basis,
        dampings,
        enough=task.handed_over,
    )
    return reached, task.update_of(reached, rows)


def freed_descents(
    task: Task, rows: Tensor, points: Tensor, values: Tensor, begun: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """A pass with free positions of the victims `rows`, from points [n, p] with values [n, R].

    Freed images descend, their patches are put in the places that fit them, and the images descend from there. A victim
    whose residual does not fall keeps its point. FREE_TOGETHER victims (on a GPU FREE_ON_GPU) move at a time.

    Args:
        begun: per victim the freed image [p'] to begin at; None: at its point.

    Returns:
        The next points [n, p], the values [n, R] there, and per victim the freed image [p'] where its next such pass
        begins. That is None, so that the pass begins at the point, if the point is a new one, or if the descent of the
        freed image reached its aim or did not move.
    """
    assert task.freed is not None
    images = points.clamp(0, 1)  # Newton's steps may have left the box far behind
    freed = task.freed.positions.freed(images)
    freed = torch.stack([own if one is None else one for own, one in zip(freed, begun, strict=True)])
    before = task.residuals(values, rows)
    # Far enough below the residual of the wrong order for the tokens to belong to another one.
    enough = task.misfit(ELSEWHERE * points.new_tensor(before, dtype=torch.float64)).clamp_max(task.handed_over)
    few = FREE_ON_GPU if points.is_cuda else FREE_TOGETHER
    found, reached, ended, falling = in_parts(few, partial(_reordered, task), rows, images, freed, enough)
    lower = [now < old for now, old in zip(task.residuals(reached, rows), before, strict=True)]
    left = [one if on and not better else None for one, on, better in zip(ended, falling.tolist(), lower, strict=True)]
    changed = torch.tensor(lower, device=points.device)[:, None]
    return torch.where(changed, found, points), torch.where(changed, reached, values), left


def in_parts(few: int, move: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors that `move` gives for a few rows of `tensors` at a time, concatenated."""
    moved = [move(*part) for part in zip(*(each.split(few) for each in tensors), strict=True)]
    return tuple(torch.cat(parts) for parts in zip(*moved, strict=True))


def _reordered(
    task: Task, rows: Tensor, images: Tensor, begun: Tensor, enough: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`freed_descents` of a few victims, whether or not their residuals fall.

    Args:
        images: [n, p], the victims' points, clamped to [0, 1].
        begun: [n, p'], the freed images to begin at.
        enough: [n], the misfits below which descents end.

    Returns:
        Images [n, p], the values [n, R] there, the freed images [n, p'] before their patches were put in places, and
        whether a further descent of these can gain: they have moved, and their misfits are above `enough` (bool [n]).
    """
    freed, basis = task.freed, task.subspace.basis
    assert freed is not None
    moved = _softened(freed.task, rows, begun, _grams(freed.task, rows, begun, _rough_gram), FREED_STAGES, enough)
    misfits, _ = freed.task.slopes_of(moved, rows)
    falling = (misfits > enough) & (moved != begun).any(1)
    placed = onto_span(freed.positions.placed(moved), images, basis).clamp(0, 1)
    reached = _softened(task, rows, placed, _grams(task, rows, placed), PLACED_STAGES, enough)
    return reached, task.update_of(reached, rows), moved, falling


def _softened(
    task: Task, rows: Tensor, points: Tensor, grams: Tensor, stages: Sequence[tuple[float, int]], enough: Tensor
) -> Tensor:
    """The points [n, p] after descents of smaller and smaller damping, all with J^T J [n, q, q] of the first points.

    Args:
        stages: (damping, evaluations) of each; enough: [n], the misfits below which they end.
    """
    for damping, evaluations in stages:
        points = preconditioned_descent(
            lambda images, places: task.slopes_of(images, rows[places]),
            points,
            grams,
            task.subspace.basis,
            grams.new_tensor([damping]),
            enough,
            evaluations,
        )
    return points


def _grams(task: Task, rows: Tensor, points: Tensor, gram_of: Callable[[Tensor], Tensor] = precise_gram) -> Tensor:
    """J^T J of the victims `rows` at points [n, p]: [n, q, q] float64."""
    return torch.stack(
        [gram_of(task.jacobian_of(int(victim), point)) for victim, point in zip(rows, points, strict=True)]
    )


def _rough_gram(rows: Tensor) -> Tensor:
    """`precise_gram` in the precision of the rows, in half the time: as a preconditioner it is good enough."""
    return gram(rows).double()

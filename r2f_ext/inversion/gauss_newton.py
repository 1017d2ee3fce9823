"""Gauss-Newton in LoRA space (docs/methods.md, 3f): the image itself from an ordinary one-step adapter.

The updates z_l = D_l^T (X_l A_l^T) of all layers are a smooth and heavily overdetermined function of the image, so the
image is the root of z(x) = z*. Each update is divided by its norm: the victim's learning rate is unknown and cancels.

Besides the damping described in `newton`, convergence from a start of 15 to 20 dB depends on three choices:
* Coordinates have unit variance over the proxies, and directions without variance are excluded (`Subspace`).
* Far from the image, where a derivative is a poor model, many short steps with exact gradients follow the valley of
  the misfit, at first held near the start (`preconditioned`); where they stall, a regression over a cloud of images
  takes their place (`linearisation`).
* Pixels may leave [0, 1] during the search, because clamped steps stop at points that are not solutions.

The passes of a search, and of several at once, are in `side_by_side`; the map z is in `update_map`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.errors import R2FError
from r2f_ext.gpu import float32_products
from r2f_ext.inversion.descents import FREE_TOGETHER
from r2f_ext.inversion.exactness import (
    DRAWS,
    Bound,
    arithmetic_errors,
    bound_error,
    in_float64,
    rounded,
    storage_precision,
)
from r2f_ext.inversion.geometry import PATCH_EMBED
from r2f_ext.inversion.linearisation import Axes
from r2f_ext.inversion.newton import ARRIVED, CREDIBLE, SOLVED, Search
from r2f_ext.inversion.pixel_axes import DenseMap
from r2f_ext.inversion.positions import FreePositions
from r2f_ext.inversion.saved_searches import SavedSearches, by_victim, files_of
from r2f_ext.inversion.searches import search_each
from r2f_ext.inversion.side_by_side import CPU_TOGETHER, Kind, search_together, victims_together
from r2f_ext.inversion.task import NEAR, Freed, GaussNewtonConfig, Task
from r2f_ext.inversion.update_map import Subspace, UpdateMap, flat_units
from r2f_ext.progress import Advance, no_progress
from r2f_ext.types import BaseModel, Reconstruction, Target

ROUTE = "gauss_newton"
# Multiple of the rounding error from which on a residual that is not below NEAR belongs to no solution nearby.
LOST = 10.0
FULL_BITS = 32  # of the dtype that PEFT draws A in
# Passes in float64, after searches that float32 ended early. If a pass gains little, precision was not the limit.
FINISH = GaussNewtonConfig(passes=6, patience=1)


class SearchMap(DenseMap, Protocol):
    """A map that can be searched: `UpdateMap` or `unrolled.UnrolledMap`.

    Attributes:
        shape: (c, h, w) of an image; a point holds one image or, in an `UnrolledMap`, several.
    """

    shape: torch.Size

    def slopes(self, points: Tensor, label: Tensor, observed: Tensor, /) -> tuple[Tensor, Tensor]:
        """Misfits [n] of points [n, p] to observed [n, R], all of one label [1], and their slopes [n, p]."""
        ...

    def on(self, base: BaseModel, /) -> SearchMap:
        """The same map for the images of another base with the same layers."""
        ...


def search(
    updates: SearchMap,
    observed: Tensor,
    start: Tensor,
    label: Tensor,
    subspace: Subspace,
    config: GaussNewtonConfig,
    loo_errors: Tensor | None = None,
    positions: FreePositions | None = None,
    noise: float = 0.0,
) -> Search:
    """Find the image whose update is observed [R] from start [c * h * w] in [0, 1] and label [1].

    Args:
        loo_errors: [n, c * h * w], leave-one-out errors of the start's route on proxies: the first cloud's shape.
        positions: `free_positions` of the map; None: patches keep their places.
        noise: residual that errors of `observed` leave at the image itself.
    """
    axes, task = [Axes.of(subspace.basis, loo_errors)], task_of_one(updates, observed, label, subspace, noise)
    if positions is not None:
        freed = task_of_one(updates.on(positions.base), observed, label, Subspace(positions.basis), noise)
        task = replace(task, freed=Freed(positions, freed))
    ((_, found),) = search_together(task, start[None], config, axes, together=1)
    return found


def task_of_one(updates: SearchMap, observed: Tensor, label: Tensor, subspace: Subspace, noise: float = 0.0) -> Task:
    """The task of `search`."""

    def update_of(images: Tensor, _: Tensor) -> Tensor:
        return torch.cat([updates(part, label) for part in images.split(updates.directions)])

    def jacobian_of(_: int, point: Tensor) -> Tensor:
        return updates.jacobian(point, label, subspace.basis)

    def slopes_of(points: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return updates.slopes(points, label, observed.expand(len(points), -1))

    layers = len(updates.target.layers)
    return Task(observed[None], layers, subspace, update_of, jacobian_of, slopes_of, noise=noise)


def finished(task: Task, found: Search, rough: Task | None = None) -> Search:
    """Continue a search in float64 if it ended near the image, but above the residual that float32 can reach.

    Where J^T J is badly conditioned, float32's errors in J stop Newton's steps early. The better of the two end points
    is kept.

    Args:
        task: of this victim alone, in float64.
        rough: the task of the search, where `task` weights the update otherwise: images are then compared by it, and
            the one from `task` is kept unless it fits clearly worse. None: both weight it alike.
    """
    if found.stopped or not SOLVED < found.residual < max(NEAR, CREDIBLE * found.noise):
        return found
    start, axes = found.image.double()[None], [Axes.of(task.subspace.basis)]
    newton = lambda *_: Kind.NEWTON  # noqa: E731
    ((_, better),) = search_together(task, start, FINISH, axes, together=1, choose=newton, restarts=False)
    both = replace(found, passes=found.passes + better.passes, seconds=found.seconds + better.seconds)
    image, residual, limit = better.image.to(found.image.dtype), better.residual, found.residual
    if rough is not None:
        victim = torch.zeros(1, dtype=torch.int64, device=image.device)
        (residual,) = rough.residuals(rough.update_of(image[None], victim), victim)
        limit = ARRIVED * found.residual
    return replace(both, image=image, residual=residual) if residual < limit else both


class UpdateBound:
    """Bounds the errors of images that were found for the updates of V one-step adapters.

    Args:
        updates: the map of the search.
        observed: name -> updates [V, d_out, r], in the values that were stored.

    Attributes:
        precise: the map in float64.
    """

    def __init__(self, updates: UpdateMap, observed: dict[str, Tensor]) -> None:
        self.updates = updates
        self.observed = {name: observed[name] for name in updates.target.names}
        a = {name: each.double() for name, each in updates.a.items()}
        self.precise = UpdateMap(in_float64(updates.target), a, updates.shape, updates.directions)

    def __call__(self, victim: int, image: Tensor, label: Tensor) -> Bound:
        """The bound for an image [c * h * w] in [0, 1] of label [1]; nothing is computed far from a solution."""
        stored = {name: each[victim, None] for name, each in self.observed.items()}
        observed = flat_units({name: each.double() for name, each in stored.items()})
        generator = torch.Generator().manual_seed(0)
        draws = [flat_units({n: rounded(each, generator) for n, each in stored.items()}) for _ in range(DRAWS)]
        errors = torch.cat(draws) - observed
        errors += arithmetic_errors(self.updates, self.precise, image, label)
        errors += self._errors_of_a(image, label, generator)
        residual = float((self.precise(image.double()[None], label)[0] - observed[0]).norm())
        rounding = float(errors.norm(dim=1).square().mean().sqrt())
        if not residual <= max(NEAR * len(stored) ** 0.5, LOST * rounding):
            return Bound()  # without the Jacobian in all pixels, which takes as long as a search
        return bound_error(self.precise, observed[0], errors, image, label, self.updates)

    def _errors_of_a(self, image: Tensor, label: Tensor, generator: torch.Generator) -> Tensor | float:
        """Errors of z by the rounding of A, [DRAWS, R]; 0 where A is stored as precisely as PEFT draws it."""
        rough = {n: each for n, each in self.updates.a.items() if storage_precision(each).bits < FULL_BITS}
        if not rough:
            return 0.0
        precise = self.precise
        with Capture(precise.target) as capture:
            gradient = capture(image.double().view(1, 1, *precise.shape), label[None])
        found = []
        for _ in range(DRAWS):
            a = {**precise.a, **{name: rounded(each, generator) for name, each in rough.items()}}
            found.append(flat_units(project(precise.target, gradient, a)))
        return torch.cat(found) - flat_units(project(precise.target, gradient, precise.a))


@float32_products()
def gauss_newton(
    target: Target,
    a: dict[str, Tensor],
    observed: dict[str, Tensor],
    start: Reconstruction,
    subspace: Subspace,
    config: GaussNewtonConfig | None = None,
    advance: Advance = no_progress,
    doubt: str | None = None,
    saved: SavedSearches | None = None,
) -> Reconstruction:
    """Route `gauss_newton`: images of V one-step, one-image adapters from their updates.

    Layers in which the update of a victim is zero are left out.

    Args:
        a: name -> A [r, d_in] of the adapters.
        observed: name -> updates [V, d_out, r], each layer at any positive scale.
        start: images [V, c, h, w] in [0, 1] and labels [V] of another route; the search succeeds only with
            the correct label and a start close enough to the image.
            Its `loo_errors`, if any, shape the first cloud of a victim.
        subspace: search space, computed from proxies.
        advance: called with 1 and a line after each victim.
        doubt: why no image can be called exact, as a clause.
        saved: where searches that have ended are kept; None: nowhere.

    Returns:
        images [V, c, h, w]: the search's if its residual is small or far below the start's, else the start.
        See `search_each`.

    Raises:
        R2FError: an update that is not finite, no layer that moved in every victim, or a start without labels.
    """
    config, target = config or GaussNewtonConfig(), moved_layers(target, observed)
    updates = UpdateMap(target, a, start.images.shape[1:], config.directions)
    targets = flat_units({layer.name: observed[layer.name] for layer in target.layers})
    bound = UpdateBound(updates, observed)
    positions = free_positions(updates, subspace)
    together = victims_together(targets.device, subspace.basis.shape[1], targets.shape[1])

    def find(victims: Sequence[int], points: Tensor, labels: Tensor) -> Iterator[tuple[int, Search]]:
        wanted = targets[list(victims)]
        task = _task_of(updates, wanted, labels, subspace)
        if positions is not None:
            freed = _task_of(updates.on(positions.base), wanted, labels, Subspace(positions.basis))
            task = replace(task, freed=Freed(positions, freed))
        axes = [Axes.of(subspace.basis, start.loo_errors.get(label)) for label in labels.tolist()]
        for place, found in search_together(task, points, config, axes, together):
            own = slice(place, place + 1)
            alone = _task_of(bound.precise, wanted[own].double(), labels[own], subspace.double())
            yield victims[place], finished(alone, found)

    files = files_of(saved, ROUTE, config, target, updates.a, by_victim(observed), start.labels)
    memory = process_bytes(subspace, positions, targets.shape[1])
    return search_each(ROUTE, start, find, bound, advance, doubt, files, memory)


def process_bytes(subspace: Subspace, positions: FreePositions | None, numbers: int) -> int | None:
    """Bytes of a process that searches for up to CPU_TOGETHER victims; None: not on a CPU, where processes do not help.

    Args:
        numbers: R of an update.
    """
    basis = subspace.basis
    if basis.device.type != "cpu":
        return None
    q, freed = basis.shape[1], basis.shape[1] if positions is None else positions.basis.shape[1]
    # Factors count the bytes of the matrices that each pass holds at its peak.
    return max(
        24 * q * numbers + 800 * q**2,  # cloud of three images a direction: updates, and kernels in float64
        8 * q * numbers + CPU_TOGETHER * 100 * q**2,  # descent
        16 * q * numbers + 350 * q**2,  # Newton in float64, with factors for every damping
        8 * freed * numbers + FREE_TOGETHER * 48 * freed**2,  # free positions
    )


def _task_of(updates: UpdateMap, observed: Tensor, labels: Tensor, subspace: Subspace) -> Task:
    def update_of(images: Tensor, owners: Tensor) -> Tensor:
        return updates(images, labels[owners])

    def jacobian_of(victim: int, point: Tensor) -> Tensor:
        return updates.jacobian(point, labels[victim, None], subspace.basis)

    def slopes_of(points: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        return updates.slopes(points, labels[owners], observed[owners])

    return Task(observed, len(updates.target.layers), subspace, update_of, jacobian_of, slopes_of)


def free_positions(updates: SearchMap, subspace: Subspace) -> FreePositions | None:
    """How patches may change places, if the base is a ViT and a point is one image.

    None where the patch embedding is adapted, whose update depends on the pixels of each patch, not on tokens alone.
    """
    if PATCH_EMBED in updates.target.names or len(subspace.basis) != updates.shape.numel():
        return None
    return FreePositions.of(updates.target.base, updates.shape, subspace.basis)


def moved_layers(target: Target, observed: dict[str, Tensor]) -> Target:
    """The target without layers in which the update [V, d_out, r] of a victim is zero.

    Raises:
        R2FError: an update that is not finite, or no layer is left.
    """
    layers = []
    for layer in target.layers:
        update = observed[layer.name].flatten(1)
        if not torch.isfinite(update).all():
            raise R2FError(f"the update of {layer.name} is not finite: the adapter is damaged.")
        if update.any(dim=1).all():
            layers.append(layer)
    if not layers:
        raise R2FError("the update of every layer is zero: the adapter is untrained.")
    return replace(target, layers=tuple(layers))

"""Gauss-Newton in LoRA space (docs/methods.md, 3f): the image itself from an ordinary one-step adapter.

The updates z_l = D_l^T (X_l A_l^T) of all layers are a smooth and heavily overdetermined function of the image, so the
image is the root of z(x) = z*. Each update is divided by its norm: the victim's learning rate is unknown and cancels.

Besides the damping described in `newton`, convergence from a start of about 20 dB depends on three choices:
* Coordinates have unit variance over the proxies, and directions without variance are excluded (`Subspace`).
* Far from the image, where a derivative is a poor model, many short steps with exact gradients follow the valley of
  the misfit (`preconditioned`); where they stall, a regression over a cloud of images takes their place
  (`linearisation`).
* Pixels may leave [0, 1] during the search, because clamped steps stop at points that are not solutions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.capture.tangents import CaptureTangents
from r2f_ext.errors import R2FError
from r2f_ext.inversion.exactness import (
    DRAWS,
    Bound,
    DenseMap,
    arithmetic_errors,
    bound_error,
    in_float64,
    rounded,
    storage_precision,
)
from r2f_ext.inversion.kept import KeptSearches, by_victim, files_of
from r2f_ext.inversion.linearisation import Axes, Cloud, linearised_step
from r2f_ext.inversion.newton import (
    DAMPINGS,
    SOLVED,
    STALLED,
    Search,
    Steps,
    dense_jacobian,
    descend,
    run_search,
)
from r2f_ext.inversion.preconditioned import Misfit, preconditioned_descent
from r2f_ext.inversion.searches import search_each
from r2f_ext.linalg import precise_gram
from r2f_ext.ops import lora_grad_tangent
from r2f_ext.progress import Advance, unheard
from r2f_ext.types import Reconstruction, Target

ROUTE = "gauss_newton"
MAX_PIXELS = 4096  # more make the dense Jacobian and its decomposition too large
SUBSPACE_IMAGES = 10000  # more change the proxies' covariance little
FULL_BITS = 32  # of the dtype that PEFT draws A in
# Relative residuals below which a derivative serves, and above which only descent from the start or a cloud does.
# Between them, descent (a derivative where there is no misfit to descend on) and clouds take turns whenever one stalls.
NEAR, FAR = 0.007, 0.1
FINISH_PASSES = 6  # of a search that float32 has ended early, in float64; most need one or two


@dataclass(frozen=True)
class GaussNewtonConfig:
    """Stopping criteria and step control.

    Attributes:
        passes: maximum per victim, of all its searches; a cloud of images and a Jacobian cost about the
            same, a pass of descent about three times that.
        patience: passes without a reduction of the residual by a fifth after which the search restarts with new clouds.
        minutes: after which no pass of a victim begins; None: no limit. A search that it cuts short depends on the
            machine's speed; the others do not.
        samples: images per direction in the clouds of the first search, of the second, ...; then from the first again.
        steps: maximum number of steps with one Jacobian.
        contraction: largest accepted ratio of the norm of the next correction to that of the present one.
        directions: batch size of tangents, or of images, in one pass of the model.
        seed: seed of the clouds.
    """

    passes: int = 40
    patience: int = 6
    minutes: float | None = None
    samples: tuple[float, ...] = (1.5, 3.0)
    steps: int = 8
    contraction: float = 0.75
    directions: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Subspace:
    """The affine search space start + basis u, scaled so that u has unit variance over the proxies.

    Attributes:
        basis: [c * h * w, q], orthogonal columns, each as long as the proxies' standard deviation along it.
    """

    basis: Tensor

    def double(self) -> Subspace:
        """The same space in float64."""
        return Subspace(self.basis.double())

    @staticmethod
    def of(images: Tensor, tolerance: float = 1e-7) -> Subspace:
        """The span of the variation of proxy images [n, c, h, w], n >= 2; variances up to `tolerance` count as 0.

        Raises:
            R2FError: the proxies are all alike, or an image has more than MAX_PIXELS numbers.
        """
        if images[0].numel() > MAX_PIXELS:
            raise R2FError(f"gauss_newton is refused: {too_large(images[0].numel())}.")
        variance, axes = torch.linalg.eigh(torch.cov(images[:SUBSPACE_IMAGES].flatten(1).double().T))
        varied = variance > tolerance
        if not varied.any():
            raise R2FError("the proxy images are all alike: gauss_newton needs proxies that vary.")
        return Subspace((axes[:, varied] * variance[varied].sqrt()).to(images.dtype))


def too_large(pixels: int) -> str:
    """Why the dense search does not accept images of this many pixel values, as a clause."""
    return f"an image has {pixels} numbers, and the search, which is dense, takes up to {MAX_PIXELS}"


class UpdateMap:
    """z(x): the updates of all layers, each of norm 1, side by side [R]; for images of shape (c, h, w)."""

    def __init__(self, target: Target, a: dict[str, Tensor], shape: torch.Size, directions: int) -> None:
        """a: name -> [r, d_in]; directions: tangents per pass."""
        self.target, self.shape, self.directions = target, shape, directions
        self.a = {layer.name: a[layer.name] for layer in target.layers}
        self.tangents = CaptureTangents(target)

    def __call__(self, points: Tensor, label: Tensor) -> Tensor:
        """Points [n, c * h * w] in [0, 1], all of one label [1] -> [n, R]."""
        return self.together(points[:, None], label)

    def together(self, batches: Tensor, label: Tensor) -> Tensor:
        """Batches [n, b, c * h * w] of one label [1], each of one step -> [n, R]."""
        with Capture(self.target) as capture:
            gradient = capture(batches.unflatten(2, self.shape), label.expand(batches.shape[:2]))
        return flat_units({name: u.detach() for name, u in project(self.target, gradient, self.a).items()})

    def jacobian(self, point: Tensor, label: Tensor, basis: Tensor) -> Tensor:
        """dz along the columns of basis [c * h * w, q] at point [c * h * w]: [q, R], by exact tangents."""
        image = point.view(1, *self.shape)
        return dense_jacobian(lambda rows: self._tangents(image, label, rows), basis, self.directions, (1, *self.shape))

    def misfit(self, point: Tensor, label: Tensor, observed: Tensor) -> Tensor:
        """|z(x) - observed|^2 / 2 of a point [c * h * w] and observed [R], differentiable with respect to the point.

        Raises:
            RuntimeError: a module of the model has no second derivative.
        """
        with Capture(self.target) as capture:
            gradient = capture(point.view(1, 1, *self.shape), label.view(1, 1), create_graph=True)
        return (flat_units(project(self.target, gradient, self.a))[0] - observed).square().sum() / 2

    def _tangents(self, image: Tensor, label: Tensor, directions: Tensor) -> Tensor:
        gradient, moved = self.tangents(image, label, directions)
        update = project(self.target, gradient, self.a)
        per_layer = (gradient.x, gradient.delta, moved.x, moved.delta, self.a)
        tangents = lora_grad_tangent(
            *([each[name] for name in self.target.names] for each in per_layer),
            scales=[layer.scale for layer in self.target.layers],
        )
        found = zip(update.values(), tangents, strict=True)
        return torch.cat([unit_tangent(value.flatten(), tangent.flatten(1)) for value, tangent in found], dim=1)


def flat_units(updates: dict[str, Tensor]) -> Tensor:
    """name -> updates [V, d_out, r] -> [V, R], the layers concatenated, each scaled to norm 1."""
    return torch.cat([F.normalize(update.flatten(1), dim=1, eps=1e-30) for update in updates.values()], dim=1)


def unit_tangent(value: Tensor, tangent: Tensor) -> Tensor:
    """The derivative of value / |value|: value [m], tangent [K, m]."""
    norm = value.norm().clamp_min(1e-30)
    unit = value / norm
    return (tangent - (tangent @ unit)[:, None] * unit) / norm


class DenseSteps(Steps):
    """Gauss-Newton near the image; farther away descent, until it stalls, then statistical linearisation.

    A restart begins with new clouds: from the same start, descent ends at the same point. Where clouds stall between
    NEAR and FAR, descent goes on from there, or Gauss-Newton where there is no misfit to descend on.
    """

    def __init__(
        self,
        updates: DenseMap,
        observed: Tensor,
        label: Tensor,
        subspace: Subspace,
        config: GaussNewtonConfig,
        loo_errors: Tensor | None = None,
        misfit: Misfit | None = None,
    ) -> None:
        self.updates, self.observed, self.label = updates, observed, label
        self.subspace, self.config = subspace, config
        self.misfit, self.descending = misfit, misfit is not None
        self.axes = Axes.of(subspace.basis, loo_errors)
        self.samples = cycle(config.samples)
        self.cloud = Cloud(self.axes.covariance, samples=next(self.samples))
        self.newton = False
        self.generator = torch.Generator().manual_seed(config.seed)

    def move(self, point: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.newton:
            return newton_steps(self.updates, self.observed, point, value, self.label, self.subspace, self.config)
        if self.descending and self.misfit is not None:
            return self.descended(self.misfit, point[0])
        point, value, self.cloud = linearised_step(
            self.update_of, self.observed, point, value, self.axes, self.cloud, self.generator
        )
        return point, value

    def descended(self, misfit: Misfit, point: Tensor) -> tuple[Tensor, Tensor]:
        """The point [1, c * h * w] and its update after preconditioned descent from point [c * h * w]."""
        jacobian = self.updates.jacobian(point, self.label, self.subspace.basis)
        reached = preconditioned_descent(misfit, point, jacobian, self.subspace.basis)[None]
        return reached, self.updates(reached, self.label)

    def update_of(self, images: Tensor) -> Tensor:
        """Images [n, c * h * w] -> [n, R], in batches."""
        return torch.cat([self.updates(part, self.label) for part in images.split(self.config.directions)])

    def judge(self, before: float, residual: float) -> None:
        stalled = not residual <= STALLED * before  # also where it is NaN
        if residual < NEAR or residual > FAR:
            self.newton = residual < NEAR
            self.descending &= not stalled
        elif stalled and self.misfit is not None:
            self.newton, self.descending = False, not self.descending
        elif stalled:
            self.newton = not self.newton

    def restart(self) -> bool:
        self.cloud, self.newton = Cloud(self.axes.covariance, samples=next(self.samples)), False
        self.descending = False
        return True


class NewtonSteps(Steps):
    """Gauss-Newton alone, for the end of a search."""

    def __init__(
        self, updates: DenseMap, observed: Tensor, label: Tensor, subspace: Subspace, config: GaussNewtonConfig
    ) -> None:
        self.updates, self.observed, self.label = updates, observed, label
        self.subspace, self.config = subspace, config

    def move(self, point: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return newton_steps(self.updates, self.observed, point, value, self.label, self.subspace, self.config)


def search(
    updates: DenseMap,
    observed: Tensor,
    start: Tensor,
    label: Tensor,
    subspace: Subspace,
    config: GaussNewtonConfig,
    loo_errors: Tensor | None = None,
    precise: DenseMap | None = None,
    misfit: Misfit | None = None,
) -> Search:
    """Find the image whose update is observed [R] from start [c * h * w] in [0, 1] and label [1].

    Args:
        loo_errors: [n, c * h * w], leave-one-out errors of the start's route on proxies: the first cloud's shape.
        precise: the map in float64. With it, a search that ends near the image but above what float32 can reach goes
            on in float64: where J^T J is badly conditioned, float32's errors in J stop Newton's steps early.
        misfit: what the search descends on, see `DenseSteps`; None: it begins with clouds.
    """
    steps = DenseSteps(updates, observed, label, subspace, config, loo_errors, misfit)
    layers = len(updates.target.layers)
    found = run_search(
        lambda images: updates(images, label),
        steps,
        observed,
        start,
        layers,
        config.passes,
        config.patience,
        inf if config.minutes is None else 60 * config.minutes,
    )
    if precise is None or found.stopped or not SOLVED < found.residual < NEAR:
        return found
    return finish(precise, observed, label, subspace, config, found)


def finish(
    precise: DenseMap, observed: Tensor, label: Tensor, subspace: Subspace, config: GaussNewtonConfig, found: Search
) -> Search:
    """Go on from the end of a search with Gauss-Newton steps in float64; the better of both ends."""
    observed = observed.double()
    steps = NewtonSteps(precise, observed, label, subspace.double(), config)
    layers, start = len(precise.target.layers), found.image.double()
    refined = run_search(
        lambda images: precise(images, label), steps, observed, start, layers, FINISH_PASSES, patience=2
    )
    if refined.residual >= found.residual:
        return replace(found, passes=found.passes + refined.passes)
    image = refined.image.to(found.image.dtype)
    return replace(found, image=image, residual=refined.residual, passes=found.passes + refined.passes)


class DenseLocal:
    """The Jacobian at one point [c * h * w], and the eigendecomposition of J^T J in float64, clamped to be >= 0."""

    batch_size = len(DAMPINGS)

    def __init__(self, updates: DenseMap, point: Tensor, label: Tensor, subspace: Subspace) -> None:
        self.basis = subspace.basis
        self.jacobian = updates.jacobian(point, label, self.basis)
        curvature, self.axes = torch.linalg.eigh(precise_gram(self.jacobian))
        self.curvature = curvature.clamp_min(0)

    def pull(self, errors: Tensor) -> Tensor:
        return (errors @ self.jacobian.T).double() @ self.axes

    def moved(self, point: Tensor, correction: Tensor) -> Tensor:
        """Not clamped to [0, 1], because clamped steps stop at points that are not solutions."""
        return point - (correction @ self.axes.T).to(self.basis.dtype) @ self.basis.T


def newton_steps(
    updates: DenseMap,
    observed: Tensor,
    point: Tensor,
    value: Tensor,
    label: Tensor,
    subspace: Subspace,
    config: GaussNewtonConfig,
) -> tuple[Tensor, Tensor]:
    """Gauss-Newton steps with one Jacobian, from point [1, c * h * w] with value [1, R]; returns the last of both."""
    local = DenseLocal(updates, point[0], label, subspace)
    solved = SOLVED * len(updates.target.layers) ** 0.5
    return descend(
        local, lambda images: updates(images, label), observed, point, value, config.steps, config.contraction, solved
    )


class UpdateBound:
    """Bounds the errors of images that were found for the updates of V one-step adapters.

    Args:
        updates: the map of the search; another one in float64 is made of it on first use.
        observed: name -> updates [V, d_out, r], in the values that were stored.
    """

    def __init__(self, updates: UpdateMap, observed: dict[str, Tensor]) -> None:
        self.updates = updates
        self.observed = {name: observed[name] for name in updates.target.names}

    @cached_property
    def precise(self) -> UpdateMap:
        a = {name: each.double() for name, each in self.updates.a.items()}
        return UpdateMap(in_float64(self.updates.target), a, self.updates.shape, self.updates.directions)

    def __call__(self, victim: int, image: Tensor, label: Tensor) -> Bound:
        """image [c * h * w] in [0, 1]; label [1]."""
        stored = {name: each[victim, None] for name, each in self.observed.items()}
        observed = flat_units({name: each.double() for name, each in stored.items()})
        generator = torch.Generator().manual_seed(0)
        draws = [flat_units({n: rounded(each, generator) for n, each in stored.items()}) for _ in range(DRAWS)]
        errors = torch.cat(draws) - observed
        errors += arithmetic_errors(self.updates, self.precise, image, label)
        errors += self._errors_of_a(image, label, generator)
        return bound_error(self.precise, observed[0], errors, image, label)

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


def gauss_newton(
    target: Target,
    a: dict[str, Tensor],
    observed: dict[str, Tensor],
    start: Reconstruction,
    subspace: Subspace,
    config: GaussNewtonConfig | None = None,
    advance: Advance = unheard,
    doubt: str | None = None,
    kept: KeptSearches | None = None,
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
        kept: where searches that have ended are kept; None: nowhere.

    Returns:
        images [V, c, h, w]: the search's if its residual is small or far below the start's, else the start.
        See `search_each`.

    Raises:
        R2FError: an update that is not finite, no layer that moved in every victim, or a start without labels.
    """
    config, target = config or GaussNewtonConfig(), moved_layers(target, observed)
    updates = UpdateMap(target, a, start.images.shape[1:], config.directions)
    targets = flat_units({layer.name: observed[layer.name] for layer in target.layers})

    def find(victim: int, image: Tensor, label: Tensor) -> Search:
        errors = start.loo_errors.get(int(label))
        wanted = targets[victim]
        misfit = partial(updates.misfit, label=label, observed=wanted)
        return search(updates, wanted, image, label, subspace, config, errors, bound.precise, misfit)

    bound = UpdateBound(updates, observed)
    files = files_of(kept, ROUTE, config, target, updates.a, by_victim(observed), start.labels)
    return search_each(ROUTE, start, find, bound, advance, doubt, files)


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

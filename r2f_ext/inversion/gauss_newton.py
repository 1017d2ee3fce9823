"""Gauss-Newton in LoRA space (METHODS 3f): the image itself from an ordinary one-step adapter.

The updates z_l = D_l^T (X_l A_l^T) of all layers are a smooth and heavily overdetermined function of the image, so the
image is the root of z(x) = z*. Each update is divided by its norm: the victim's learning rate is unknown and cancels.

What makes it converge from a start of about 20 dB:
* coordinates in which the proxies vary by one (`Subspace`): where no proxy varies, nothing is searched;
* a damping that is chosen anew for every step by the *natural* monotonicity test (Deuflhard, Newton Methods for
  Nonlinear Problems, 2004, section 4.3): a step is good if it shrinks the next correction (J^T J + m I)^-1 J^T r, not
  the residual. The residual is ruled by a few steep directions, and a search that insists on its decrease stalls in
  their curved valleys;
* several such steps with one Jacobian, as long as they contract (simplified Newton): a Jacobian costs a thousand
  times what a step does;
* where the image is still too far for a derivative, a regression over a cloud of images instead (`linearisation`);
* no box: pixels may leave [0, 1] on the way, since clamping every step stops searches at points that are no solution.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.capture.tangents import CaptureTangents
from r2f_ext.errors import R2FError
from r2f_ext.inversion.linearisation import Axes, Cloud, linearised_step
from r2f_ext.ops import lora_grad_tangent
from r2f_ext.pairs.generate import project
from r2f_ext.types import Reconstruction, Target

ROUTE = "gauss_newton"
DAMPINGS = tuple(10.0**-k for k in range(2, 14))  # shares of J^T J's largest eigenvalue
SOLVED = 1e-5  # relative residual below which float32 says no more
EXACT = 1e-3  # relative residual of an image, its pixels in [0, 1], that is the victim's own
PRECISE = 1e-4  # relative residual below which a search that no longer improves is at float32's end
MAX_PIXELS = 4096  # more make the dense Jacobian and its decomposition too large
SUBSPACE_IMAGES = 10000  # more change the proxies' covariance little
FOLLOWED = 0.03  # share of the start's residual below which an image that is not exact is preferred to the start
NEAR, FAR = 0.007, 0.02  # relative residuals below which a derivative serves, and above which only a cloud does
STALLED = 0.8  # of the residual left by a pass that got nowhere


@dataclass(frozen=True)
class GaussNewtonConfig:
    """When to stop, and what a good step is.

    Attributes:
        passes: at most, a victim; one is a cloud of images or a Jacobian, which cost about the same.
        patience: passes without a residual a fifth lower, after which the search begins again with other clouds.
        steps: at most, with one Jacobian.
        contraction: a step must shrink the next correction to this share.
        directions: tangents, or images, that go through the model at once.
        seed: of the clouds.
    """

    passes: int = 22
    patience: int = 7
    steps: int = 8
    contraction: float = 0.75
    directions: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Subspace:
    """Where images are looked for: start + basis u, with u of unit size for a difference like that between proxies.

    Attributes:
        basis: [c * h * w, q], orthogonal columns, each as long as the proxies' standard deviation along it.
    """

    basis: Tensor

    @staticmethod
    def of(images: Tensor, tolerance: float = 1e-7) -> Subspace:
        """The span of the variation of proxy images [n, c, h, w], n >= 2; variances up to `tolerance` count as none.

        Raises:
            R2FError: the proxies are all alike, or an image has more than MAX_PIXELS numbers.
        """
        if images[0].numel() > MAX_PIXELS:
            raise R2FError(f"gauss_newton is refused: {too_large(images[0].numel())}.")
        variance, axes = torch.linalg.eigh(torch.cov(images[:SUBSPACE_IMAGES].flatten(1).double().T))
        kept = variance > tolerance
        if not kept.any():
            raise R2FError("the proxy images are all alike: gauss_newton needs proxies that vary.")
        return Subspace((axes[:, kept] * variance[kept].sqrt()).to(images.dtype))


def too_large(pixels: int) -> str:
    """Why the dense search does not take images of so many numbers, half a sentence."""
    return f"an image has {pixels} numbers, and the search, which is dense, takes up to {MAX_PIXELS}"


class UpdateMap:
    """z(x): the updates of all layers, each of norm 1, side by side [R]; for images of shape (c, h, w)."""

    def __init__(self, target: Target, a: dict[str, Tensor], shape: torch.Size, directions: int) -> None:
        """a[name] [r, d_in]; directions: tangents of one pass."""
        self.target, self.shape, self.directions = target, shape, directions
        self.a = {layer.name: a[layer.name] for layer in target.layers}
        self.tangents = CaptureTangents(target)

    def __call__(self, points: Tensor, label: Tensor) -> Tensor:
        """Points [n, c * h * w] in [0, 1], all of one label [1] -> [n, R]."""
        with Capture(self.target) as capture:
            gradient = capture(points.unflatten(1, self.shape)[:, None], label.expand(len(points))[:, None])
        return flat_units({name: u.detach() for name, u in project(self.target, gradient, self.a).items()})

    def jacobian(self, point: Tensor, label: Tensor, basis: Tensor) -> Tensor:
        """dz along the columns of basis [c * h * w, q] at point [c * h * w]: [q, R], by exact tangents."""
        image, columns = point.view(1, *self.shape), basis.shape[1]
        # Whole passes only: the tangents are traced for one shape.
        rows = F.pad(basis.T, (0, 0, 0, -columns % self.directions)).unflatten(1, (1, *self.shape))
        return torch.cat([self._tangents(image, label, part) for part in rows.split(self.directions)])[:columns]

    def _tangents(self, image: Tensor, label: Tensor, directions: Tensor) -> Tensor:
        gradient, moved = self.tangents(image, label, directions)
        update = project(self.target, gradient, self.a)
        parts = []
        for layer in self.target.layers:
            name = layer.name
            tangent = lora_grad_tangent(
                gradient.x[name],
                gradient.delta[name],
                moved.x[name],
                moved.delta[name],
                self.a[name],
                scale=layer.scale,
            ).grad_B
            parts.append(unit_tangent(update[name].flatten(), tangent.flatten(1)))
        return torch.cat(parts, dim=1)


def flat_units(updates: dict[str, Tensor]) -> Tensor:
    """Updates [V, d_out, r] a layer -> [V, R], every layer's part of norm 1."""
    return torch.cat([F.normalize(update.flatten(1), dim=1, eps=1e-30) for update in updates.values()], dim=1)


def unit_tangent(value: Tensor, tangent: Tensor) -> Tensor:
    """The derivative of value / |value|: value [m], tangent [K, m]."""
    norm = value.norm().clamp_min(1e-30)
    unit = value / norm
    return (tangent - (tangent @ unit)[:, None] * unit) / norm


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
        """Whether the image is the victim's, told without the original: its update is the observed one."""
        return self.residual < EXACT

    @property
    def followed(self) -> bool:
        """Whether the image is to be preferred to the start."""
        return self.residual < max(EXACT, FOLLOWED * self.start_residual)


def search(
    updates: UpdateMap,
    observed: Tensor,
    start: Tensor,
    label: Tensor,
    subspace: Subspace,
    config: GaussNewtonConfig,
    loo_errors: Tensor | None = None,
) -> Search:
    """Find the image whose update is observed [R] from start [c * h * w] in [0, 1] and label [1].

    Far from it by statistical linearisation, near it by Gauss-Newton; from the start again, with other clouds, after
    several passes that got nowhere. The point of least residual is returned.
    loo_errors [n, c * h * w]: what the start's route gets wrong on proxies, the first cloud's shape.
    """
    axes, generator = Axes.of(subspace.basis, loo_errors), torch.Generator().manual_seed(config.seed)
    scale = len(updates.target.layers) ** 0.5
    beginning = start[None], updates(start[None], label), Cloud(axes.covariance)

    def update_of(images: Tensor) -> Tensor:
        return torch.cat([updates(part, label) for part in images.split(config.directions)])

    def misfit(value: Tensor) -> float:
        return float((value - observed).norm()) / scale

    point, value, cloud = beginning
    first = residual = lowest = misfit(value)
    best, least, newton, passes, since = point, residual, residual < NEAR, 0, 0
    while least > SOLVED and passes < config.passes:
        before = residual
        if newton:
            point, value = newton_steps(updates, observed, point, value, label, subspace, config)
        else:
            point, value, cloud = linearised_step(update_of, observed, point, value, axes, cloud, generator)
        residual = misfit(value)
        passes += 1
        image = point.clamp(0, 1)
        if (reached := misfit(updates(image, label))) < least:  # solutions outside the box are not the image
            best, least = image, reached
        lowest, since = (residual, 0) if residual < STALLED * lowest else (lowest, since + 1)
        if least < PRECISE and since == 2:
            break  # float32 knows no more
        if since == config.patience:
            point, value, cloud = beginning
            residual = lowest = first
            newton, since = False, 0
        else:
            newton = residual < NEAR or (residual < FAR and (newton or residual > STALLED * before))
    return Search(best[0], least, first, passes)


def newton_steps(
    updates: UpdateMap,
    observed: Tensor,
    point: Tensor,
    value: Tensor,
    label: Tensor,
    subspace: Subspace,
    config: GaussNewtonConfig,
) -> tuple[Tensor, Tensor]:
    """Gauss-Newton steps with one Jacobian, from point [1, c * h * w] with update value [1, R]; the last of both.

    The Jacobian and J^T J are in the model's dtype, the decomposition and all that follows from it in float64. In
    float32 the smallest curvatures are rounding; steps that rest on them are caught by the natural monotonicity test.
    """
    basis = subspace.basis
    jacobian = updates.jacobian(point[0], label, basis)
    curvature, axes = torch.linalg.eigh((jacobian @ jacobian.T).double())
    damped = torch.stack([curvature + share * curvature[-1] for share in DAMPINGS])  # [m, q]

    def pulled(values: Tensor) -> Tensor:
        return ((values - observed) @ jacobian.T).double() @ axes  # J^T r in the axes of J^T J

    pull, solved = pulled(value), SOLVED * len(updates.target.layers) ** 0.5
    for step in range(config.steps):
        trials = point - ((pull / damped) @ axes.T).to(basis.dtype) @ basis.T
        values = updates(trials, label)
        pulls = pulled(values)
        ratio = (pulls / damped).norm(dim=1) / (pull / damped).norm(dim=1)
        good = (ratio < config.contraction).nonzero().flatten()
        if len(good) == 0 and step > 0:
            break
        chosen = int(good[-1]) if len(good) else int(ratio.argmin())  # the least damped of the good ones
        point, value, pull = trials[chosen, None], values[chosen, None], pulls[chosen, None]
        if float((value - observed).norm()) < solved:
            break
    return point, value


def gauss_newton(
    target: Target,
    a: dict[str, Tensor],
    observed: dict[str, Tensor],
    start: Reconstruction,
    subspace: Subspace,
    config: GaussNewtonConfig | None = None,
    advance: Callable[[int], None] = lambda victims: None,
) -> Reconstruction:
    """Route `gauss_newton`: images of V one-step, one-image adapters from their updates.

    Args:
        a: name -> A [r, d_in], as the adapters have it.
        observed: name -> updates [V, d_out, r], of any positive scale a layer.
        start: images [V, c, h, w] in [0, 1] and labels [V] of another route; label and neighbourhood must be right.
            Its `loo_errors`, if any, shape the first cloud of a victim.
        subspace: where to search, from proxies.
        advance: called after each victim, for progress bars.

    Returns:
        images [V, c, h, w]: the search's where it ended exactly or far below the start's residual, else the start's.
        See `reconstruction_of`.

    Raises:
        R2FError: an update that is zero or not finite, or a start without labels.
    """
    began = time.perf_counter()
    config = config or GaussNewtonConfig()
    if start.labels is None:
        raise R2FError("gauss_newton needs labels: start it from a route that finds them.")
    for name, update in observed.items():
        if not torch.isfinite(update).all() or not update.flatten(1).any(dim=1).all():
            raise R2FError(f"the update of {name} is zero or not finite: the adapter is untrained or damaged.")
    updates = UpdateMap(target, a, start.images.shape[1:], config.directions)
    wanted = flat_units({layer.name: observed[layer.name] for layer in target.layers})
    searches: list[Search] = []
    for victim, (image, label) in enumerate(zip(start.images, start.labels, strict=True)):
        errors = start.loo_errors.get(int(label))
        searches.append(search(updates, wanted[victim], image.flatten(), label[None], subspace, config, errors))
        advance(1)
    return reconstruction_of(ROUTE, searches, start, began)


def reconstruction_of(route: str, searches: list[Search], start: Reconstruction, began: float) -> Reconstruction:
    """One search per victim -> images: the search's where it ended exactly or far below the start, else the start's.

    Args:
        start: images and labels that the searches began from.
        began: `time.perf_counter()` before the first search.

    Returns:
        `per_victim` holds `residual`, `start_residual`, `exact` (1 or 0) and `passes`; `details` how many are exact.
    """
    images = [
        one.image.view_as(image) if one.followed else image for one, image in zip(searches, start.images, strict=True)
    ]
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
    return Reconstruction(route, torch.stack(images), start.labels, why, seconds, details, per_victim)

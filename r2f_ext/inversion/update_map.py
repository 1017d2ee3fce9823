"""The update of a one-step adapter as a function of its image, z(x), and its derivatives (docs/methods.md, 3f)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.capture.tangents import CaptureTangents
from r2f_ext.cuda_graph import Replayed
from r2f_ext.errors import R2FError
from r2f_ext.inversion.newton import dense_jacobian
from r2f_ext.ops import lora_grad_tangent
from r2f_ext.types import BaseModel, Target

MAX_PIXELS = 4096  # more make the dense Jacobian and its decomposition too large
SUBSPACE_IMAGES = 10000  # more change the proxies' covariance little
GPU_DIRECTIONS, GPU_IMAGES = 400, 2048  # tangents and images in one pass of a GPU
GRAPH_IMAGES = 512  # images up to which a pass is captured: its launches take longer than the GPU's work
# Weight of half the squared distance to [0, 1]^p in the misfit of a descent: without it many searches end outside, at
# images that are nearly solutions.
BOX_PENALTY = 0.1


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


def onto_span(points: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """The nearest points of mean + span(basis) to points [n, p]; mean [p], or [n, p] for each; basis [p, q] with
    orthogonal columns."""
    shifts = (points - mean) @ basis / basis.square().sum(0)
    return mean + shifts @ basis.mT


def too_large(pixels: int) -> str:
    """Why the dense search does not accept images of this many pixel values, as a clause."""
    return f"an image has {pixels} numbers, and the search, which is dense, takes up to {MAX_PIXELS}"


class UpdateMap:
    """z(x): the updates of all layers, each of norm 1, side by side [R]; for images of shape (c, h, w)."""

    def __init__(self, target: Target, a: dict[str, Tensor], shape: torch.Size, directions: int) -> None:
        """a: name -> [r, d_in]; directions: tangents, and images, in one pass of a CPU; a GPU takes more."""
        on_gpu = target.base.device.type == "cuda"
        self.target, self.shape = target, shape
        self.directions, self.images = (GPU_DIRECTIONS, GPU_IMAGES) if on_gpu else (directions, directions)
        self.a = {layer.name: a[layer.name] for layer in target.layers}
        self._capture, self.tangents = Capture(target), CaptureTangents(target)
        self._values, self._tangents = Replayed(self._values_of), Replayed(self._tangents_of)
        self._slopes = Replayed(self._slopes_of)
        self._others: dict[BaseModel, UpdateMap] = {}

    def on(self, base: BaseModel) -> UpdateMap:
        """The same map for the images of another base with the same layers; made once, because tracing takes long."""
        if base not in self._others:
            target, shape = replace(self.target, base=base), torch.Size(base.input_shape)
            self._others[base] = UpdateMap(target, self.a, shape, self.directions)
        return self._others[base]

    def __call__(self, points: Tensor, labels: Tensor) -> Tensor:
        """Points [n, c * h * w] in [0, 1], labels [n], or [1] where all have one -> [n, R]."""
        return self.together(points[:, None], labels)

    def together(self, batches: Tensor, labels: Tensor) -> Tensor:
        """Batches [n, b, c * h * w], each of one step and of one label: labels [n], or [1] for all -> [n, R]."""
        labels = labels.expand(len(batches))
        parts = zip(batches.split(self.images), labels.split(self.images), strict=True)
        return torch.cat([self._pass(*part) for part in parts])

    def _pass(self, batches: Tensor, labels: Tensor) -> Tensor:
        """`together` in one pass through the model."""
        count = len(batches)
        if not Replayed.captures_on(batches.device) or not 0 < count * batches.shape[1] <= GRAPH_IMAGES:
            return self._values_of(batches, labels)
        return self._values(*_filled(1 << (count - 1).bit_length(), batches, labels))[:count].clone()

    def _values_of(self, batches: Tensor, labels: Tensor) -> Tensor:
        return self._updates(batches, labels).detach()

    def _updates(self, batches: Tensor, labels: Tensor, create_graph: bool = False) -> Tensor:
        images = batches.unflatten(2, self.shape)
        with self._capture as capture:
            gradient = capture(images, labels[:, None].expand(images.shape[:2]), create_graph)
        return flat_units(project(self.target, gradient, self.a))

    def jacobian(self, point: Tensor, label: Tensor, basis: Tensor) -> Tensor:
        """dz along the columns of basis [c * h * w, q] at point [c * h * w]: [q, R], by exact tangents."""
        return dense_jacobian(lambda rows: self.along(point, label, rows), basis, self.directions, (-1,))

    def along(self, point: Tensor, label: Tensor, directions: Tensor) -> Tensor:
        """dz along directions [K, c * h * w] at point [c * h * w]: [K, R], by exact tangents."""
        rows = directions.view(-1, 1, *self.shape)
        return self._tangents(point.view(1, *self.shape), label, rows).clone()

    def differentiable(self, points: Tensor, labels: Tensor) -> Tensor:
        """z of points [n, c * h * w] and labels [n]: [n, R], with the graph that its slope at the points needs."""
        with torch.enable_grad():
            return self._updates(points[:, None], labels, create_graph=True)

    def slopes(self, points: Tensor, labels: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Misfits of n points and their slopes; a further call overwrites the results of this one.

        Args:
            points: [n, c * h * w]; labels: [n], or [1] where all have one; observed: [n, R].

        Returns:
            |z(x) - observed|^2 / 2 + BOX_PENALTY |x - clamp(x)|^2 / 2 of every point [n], and its slope [n, c * h * w].

        Raises:
            RuntimeError: a module of the model has no second derivative.
        """
        count, labels = len(points), labels.expand(len(points))
        if Replayed.captures_on(points.device):
            points, labels, observed = _filled(few_sizes(count), points, labels, observed)
        misfits, slopes = self._slopes(points, labels, observed)
        return misfits[:count], slopes[:count]

    def _slopes_of(self, points: Tensor, labels: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            misfits = (self.differentiable(points, labels) - observed).square().sum(1) / 2
            (slopes,) = torch.autograd.grad(misfits.sum(), [points])
        return with_box_penalty(points.detach(), misfits.detach(), slopes)

    def _tangents_of(self, image: Tensor, label: Tensor, directions: Tensor) -> Tensor:
        gradient, moved = self.tangents(image, label, directions)
        update = project(self.target, gradient, self.a)
        per_layer = (gradient.x, gradient.delta, moved.x, moved.delta, self.a)
        tangents = lora_grad_tangent(
            *([each[name] for name in self.target.names] for each in per_layer),
            scales=[layer.scale for layer in self.target.layers],
        )
        found = zip(update.values(), tangents, strict=True)
        return torch.cat([unit_tangent(value.flatten(), tangent.flatten(1)) for value, tangent in found], dim=1)


def with_box_penalty(points: Tensor, misfits: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Misfits [n] of points [n, p], and their slopes [n, p], with BOX_PENALTY |x - clamp(x)|^2 / 2 added."""
    outside = points - points.clamp(0, 1)
    return misfits + BOX_PENALTY / 2 * outside.square().sum(1), slopes + BOX_PENALTY * outside


def _filled(size: int, *tensors: Tensor) -> list[Tensor]:
    """The tensors [n, ...] filled up to [size, ...] by their last rows, because each size is captured separately."""
    return [torch.cat([each, each[-1:].expand(size - len(each), *each.shape[1:])]) for each in tensors]


def few_sizes(count: int) -> int:
    """The smallest of 1 to 8, 10, 12, 14, 16, 20, 24, ... that is not below the count: four between powers of two."""
    return count + -count % (1 << max(0, count.bit_length() - 3))


def flat_units(updates: dict[str, Tensor]) -> Tensor:
    """name -> updates [V, d_out, r] -> [V, R], the layers concatenated, each scaled to norm 1."""
    return torch.cat([F.normalize(update.flatten(1), dim=1, eps=1e-30) for update in updates.values()], dim=1)


def unit_tangent(value: Tensor, tangent: Tensor) -> Tensor:
    """The derivative of value / |value|: value [m], tangent [K, m]."""
    norm = value.norm().clamp_min(1e-30)
    unit = value / norm
    return (tangent - (tangent @ unit)[:, None] * unit) / norm

"""Dataclasses of tensors that are passed between the stages.

Shapes use P groups (victims or proxy steps), N tokens of one group, r the rank. Every mapping is
keyed by the module path of an adapted layer in the base model, e.g. `blocks.0.attn.qkv`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BaseModel:
    """A public base model and what is needed to feed it.

    Attributes:
        model: classifier in eval mode, no parameter requires a gradient; it maps inputs [n, c, h, w] to logits
            [n, num_classes].
        spec: how the user named it, see `load_base`.
        input_shape: (channels, height, width).
        mean, std: per channel, applied to pixels in [0, 1].
        num_classes: width of the head; 0: the base has no classifier, and the model gives features.
        notes: sentences that qualify every figure measured on this base (random weights, assumed pixel statistics).
    """

    model: nn.Module
    spec: str
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    notes: tuple[str, ...] = ()

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels [n, c, h, w] in [0, 1] -> what the model reads."""
        return (images - _per_channel(self.mean, images)) / _per_channel(self.std, images)

    def denormalize(self, inputs: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return inputs * _per_channel(self.std, inputs) + _per_channel(self.mean, inputs)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def _per_channel(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """[c, 1, 1], filled on the device: a copy from the host waits for the device and cannot be captured in a graph."""
    return torch.stack([like.new_full((1, 1), number) for number in numbers])


@dataclass(frozen=True)
class AdaptedLayer:
    """One linear layer W [d_out, d_in] with LoRA factors A [r, d_in], B [d_out, r], scale alpha / r (or rsLoRA's).

    saved: the file holds the layer's whole trained weight. Then A is the identity and never trained, B is the change of
    the weight, and the scale is 1.
    """

    name: str
    d_out: int
    d_in: int
    rank: int
    scale: float
    saved: bool = False


@dataclass(frozen=True)
class Target:
    """A base model and the layers of it that an adapter changes, in the order of the model's modules."""

    base: BaseModel
    layers: tuple[AdaptedLayer, ...]

    def layer(self, name: str) -> AdaptedLayer:
        return next(layer for layer in self.layers if layer.name == name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    def without_saved(self) -> Target:
        """The layers with trained LoRA factors alone."""
        return replace(self, layers=tuple(layer for layer in self.layers if not layer.saved))


@dataclass(frozen=True)
class LoraUpdate:
    """One adapter's factors after the victim's steps, float32 or float64.

    Attributes:
        a: name -> [r, d_in].
        b: name -> the change of B since the start [d_out, r], which is B itself where B started at 0 as PEFT's does.
        a0: name -> A before the first step, where it is known.
        b0: name -> B before the first step, where it was not 0.
        stored: the lowest-precision float dtype that holds the file's factors exactly.
        saved: layers whose whole weight is in the file: A is the identity, B its change (`AdaptedLayer.saved`).
        gradients: parameter name -> start - end, in the parameter's shape, of the parameters whose whole value is in
            the file: after one step of plain SGD the exact gradient, times the learning rate.
        label: the class of the images, where a head saved with the adapter tells it (`models.saved_head`).
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    a0: dict[str, Tensor] | None = None
    b0: dict[str, Tensor] | None = None
    stored: torch.dtype = torch.float32
    saved: frozenset[str] = frozenset()
    gradients: dict[str, Tensor] = field(default_factory=dict)
    label: int | None = None

    @property
    def start(self) -> dict[str, Tensor]:
        """A before the first step, or, for layers where that is unknown, A after training: name -> [r, d_in]."""
        return self.a if self.a0 is None else self.a | self.a0

    def without_saved(self) -> LoraUpdate:
        """The trained LoRA factors alone, without the layers whose whole weight is in the file."""
        a, b = ({name: each for name, each in of.items() if name not in self.saved} for of in (self.a, self.b))
        return replace(self, a=a, b=b, saved=frozenset())


@dataclass(frozen=True)
class FactoredGradient:
    """Full gradients of P groups as factors: G_p = delta_p^T x_p. Only `dense` forms the product.

    Attributes:
        x: name -> layer inputs [P, N, d_in].
        delta: name -> loss gradients at the layer outputs [P, N, d_out].
    """

    x: Mapping[str, Tensor]
    delta: Mapping[str, Tensor]

    @classmethod
    def of_dense(cls, dense: dict[str, Tensor]) -> FactoredGradient:
        """Dense gradients dense[name] [P, d_out, d_in] in factored form, G = I G: d_out tokens, delta = I, x = G."""
        identity = {name: torch.eye(g.shape[1], dtype=g.dtype, device=g.device) for name, g in dense.items()}
        return cls(dict(dense), {name: identity[name].expand(len(g), -1, -1) for name, g in dense.items()})

    def dense(self, name: str) -> Tensor:
        """G [P, d_out, d_in] of one layer."""
        return self.delta[name].mT @ self.x[name]

    def float32(self) -> FactoredGradient:
        """The same factors in float32. A factor is converted whenever it is read, so that unread ones cost nothing."""
        return FactoredGradient(_InFloat32(self.x), _InFloat32(self.delta))


@dataclass(frozen=True, eq=False)
class _InFloat32(Mapping[str, Tensor]):
    """Tensors of any dtype, read as float32."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(frozen=True)
class Gradient:
    """Dense full gradients: dense[name] [P, d_out, d_in] (P groups)."""

    dense: dict[str, Tensor]


@dataclass(frozen=True)
class PairBatch:
    """P (LoRA update, full gradient) pairs taken from one start, with the samples that made them.

    Attributes:
        updates: name -> (B_0 - B_T) over the sum of the learning rates [P, d_out, r], of all layers; for one step of
            plain SGD from PEFT's start the gradient with respect to B, s G A^T.
        gradients: the full gradients as factors, of the layers of the source's target.
        images: [P, b, c, h, w] in [0, 1]; labels [P, b].
        a0: name -> the A that each victim started from [P, r, d_in]; None where all start from the source's `a`.
        a: name -> each victim's A after its steps [P, r, d_in]; None where they leave A as it was (one step of SGD).
    """

    updates: dict[str, Tensor]
    gradients: FactoredGradient
    images: Tensor
    labels: Tensor
    a0: dict[str, Tensor] | None = None
    a: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Reconstruction:
    """The reconstructions of V victims by one route.

    Attributes:
        route: its name in the registry (r2f_ext.inversion.routes).
        images: [V, c, h, w] in [0, 1].
        labels: [V], the label the route used or found; None where it needs none.
        why: one sentence on why this route was taken or what limits it.
        seconds: wall time for all V.
        details: figures of the route as a whole (spectra, held-out errors, ...), plain numbers.
        loo_errors: label -> [n, c * h * w], leave-one-out errors of a statistical route on proxies of that label.
        per_victim: figures of each victim (residuals, passes, ...), float64 [V] each.
        doubt: why no image can be called exact whatever its figures say, as a clause; None: no reason is known.
    """

    route: str
    images: Tensor
    labels: Tensor | None
    why: str
    seconds: float
    details: dict[str, float] = field(default_factory=dict)
    loo_errors: dict[int, Tensor] = field(default_factory=dict)
    per_victim: dict[str, Tensor] = field(default_factory=dict)
    doubt: str | None = None

    def take(self, rows: slice) -> Reconstruction:
        """The same reconstruction with only the victims `rows`.

        `why` then says that it refers to all adapters, and `details` keeps only figures that `per_victim` lacks.
        """
        if len(self.images[rows]) == len(self.images):
            return self
        return replace(
            self,
            why=f"{self.why} (all {len(self.images)} adapters together)",
            details={name: value for name, value in self.details.items() if name not in self.per_victim},
            images=self.images[rows],
            labels=None if self.labels is None else self.labels[rows],
            per_victim={name: figures[rows] for name, figures in self.per_victim.items()},
        )

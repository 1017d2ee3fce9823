"""`matching_loss`: how far T trials' gradients are from the observed ones, and how rough their images, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .reference import accumulation_dtype
from .schemas import NAMESPACE

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
KINDS = ("layer_cosine", "cosine", "l2")


def matching_loss(
    candidate: Sequence[Tensor],
    observed: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    kind: str = "layer_cosine",
    images: Tensor | None = None,
    tv_weight: float = 0.0,
    isotropic: bool = False,
) -> Tensor:
    """Distance between lists of gradients, trial by trial, plus `tv_weight` times the images' total variation: [T].

    With c_l, o_l the candidate and observed gradient of layer l, and w_l its weight, divided by the weights' sum:

        layer_cosine   sum_l w_l (1 - <c_l, o_l> / (|c_l| |o_l|))
        cosine         1 - sum_l w_l <c_l, o_l> / sqrt(sum_l w_l |c_l|^2  sum_l w_l |o_l|^2)
        l2             sum_l w_l |c_l - o_l|^2

    `cosine` with equal weights is Geiping et al., "Inverting Gradients", NeurIPS 2020, Eq. 4. A gradient of norm zero
    has cosine 0 with everything, and no derivative. For total variation see `total_variation`.

    Shapes (L layers):
        candidate  L tensors [T, ...]
        observed   L tensors of the same shapes, or [1, ...] for all trials
        weights    L numbers >= 0, not all zero; None: all equal
        images     [T, c, h, w], or None

    Gradients share one dtype: float32, float64 or bfloat16; images have any of them. Neighbouring elements (on the CPU
    1024, unless float32 cannot hold their sums) are summed in float32, scaled against underflow on CUDA, and all else
    in float64; the loss is float32 (all is float64 for float64). Any strides.
    Deterministic. Differentiable in candidate, observed and images: once in one pass of a kernel, twice through
    ordinary PyTorch operators, which costs their memory.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, unknown kind, bad weights, several devices.
        TypeError: dtypes that are not supported or differ from each other.
    """
    _check(candidate, observed, images)
    settings = _Settings(shares(len(candidate), weights), check_kind(kind), float(tv_weight), bool(isotropic))
    loss: Tensor = _MatchingLoss.apply(len(candidate), settings, images, *candidate, *observed)
    return loss


class _Settings(NamedTuple):
    weights: list[float]
    kind: str
    tv_weight: float
    isotropic: bool


def shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """The weights of `count` layers, divided by their sum."""
    if weights is None:
        return [1.0 / count] * count
    total = float(sum(weights))
    if len(weights) != count or not total > 0 or min(weights) < 0:
        raise ValueError(f"matching loss: weights must be {count} numbers >= 0, not all zero; got {list(weights)}")
    return [float(w) / total for w in weights]


def check_kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"matching loss: kind must be one of {', '.join(KINDS)}; got {kind!r}")
    return kind


def _check(candidate: Sequence[Tensor], observed: Sequence[Tensor], images: Tensor | None) -> None:
    """Runs on every call, so it touches each shape once."""
    if not candidate or len(candidate) != len(observed):
        raise ValueError(
            "matching_loss: candidate and observed must be lists of the same length, at least 1; "
            f"got {len(candidate)} and {len(observed)}"
        )
    first = candidate[0]
    trials, dtype, device = first.shape[:1], first.dtype, first.device
    if dtype not in DTYPES:
        raise TypeError(f"matching_loss: candidate must be float32, float64 or bfloat16; got {dtype}")
    for i, (c, o) in enumerate(zip(candidate, observed, strict=True)):
        c_shape, o_shape = c.shape, o.shape
        if (c_shape != o_shape and (c_shape[1:] != o_shape[1:] or o_shape[:1] != (1,))) or c_shape[:1] != trials:
            raise ValueError(
                "matching_loss: candidate must be tensors [T, ...] and observed of the same shapes or [1, ...]; "
                f"tensor {i} is {list(c_shape)} against {list(o_shape)}, T = {list(trials)}"
            )
        if c.dtype != dtype or o.dtype != dtype:
            raise TypeError(
                f"matching_loss: candidate and observed must share one dtype; tensor {i} is {c.dtype} against {o.dtype}"
            )
        if c.device != device or o.device != device:
            raise ValueError(f"matching_loss: all tensors must be on one device; tensor {i} is not on {device}")
    if not trials:
        raise ValueError("matching_loss: candidate must be tensors [T, ...]; the first has no dimension")
    if images is not None:
        if images.dim() != 4 or images.shape[:1] != trials:
            raise ValueError(f"matching_loss: images must be [{trials[0]}, c, h, w]; got {list(images.shape)}")
        if images.dtype not in DTYPES:
            raise TypeError(f"matching_loss: images must be float32, float64 or bfloat16; got {images.dtype}")
        if images.device != device:
            raise ValueError(f"matching_loss: all tensors must be on one device; images are not on {device}")


class _MatchingLoss(torch.autograd.Function):
    """A Function around the raw operators: for lists of tensors `register_autograd` costs twice the time a call."""

    @staticmethod
    def forward(ctx: Any, count: int, settings: _Settings, images: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.count, ctx.settings = count, settings
        loss, sums = torch.ops.r2f.matching_loss.default(
            tensors[:count], tensors[count:], settings.weights, settings.kind, images, *settings[2:]
        )
        ctx.save_for_backward(sums, images, *tensors)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        count, settings = ctx.count, ctx.settings
        sums, images, *tensors = ctx.saved_tensors
        candidate, observed = tensors[:count], tensors[count:]
        to_observed = any(ctx.needs_input_grad[3 + count :])
        # Asked for a graph of the gradient: the reference is made of operators that can be differentiated again, and so
        # must the sums be.
        again = torch.is_grad_enabled()
        if again:
            sums = reference.matching_sums(candidate, observed)
        backward = reference.matching_loss_backward if again else torch.ops.r2f.matching_loss_backward.default
        weights, kind, tv_weight, isotropic = settings
        to_c, to_o, to_images = backward(
            grad_loss, candidate, observed, sums, weights, kind, images, tv_weight, isotropic, to_observed
        )
        if candidate[0].dtype == torch.bfloat16:
            to_c, to_o = ([t.to(torch.bfloat16) for t in grads] for grads in (to_c, to_o))
        to_images = None if images is None else to_images.to(images.dtype)
        return None, None, to_images, *to_c, *(to_o if to_observed else [None] * count)


@torch.library.register_fake(f"{NAMESPACE}::matching_loss")
def _fake(
    candidate: list[Tensor],
    observed: list[Tensor],
    weights: list[float],
    kind: str,
    images: Tensor | None,
    tv_weight: float,
    isotropic: bool,
) -> tuple[Tensor, Tensor]:
    first = candidate[0]
    loss = first.new_empty(first.shape[:1], dtype=accumulation_dtype(first.dtype))
    return loss, first.new_empty((len(candidate), first.shape[0], 4), dtype=torch.float64)


@torch.library.register_fake(f"{NAMESPACE}::matching_loss_backward")
def _fake_backward(
    grad_loss: Tensor,
    candidate: list[Tensor],
    observed: list[Tensor],
    sums: Tensor,
    weights: list[float],
    kind: str,
    images: Tensor | None,
    tv_weight: float,
    isotropic: bool,
    to_observed: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    dtype = accumulation_dtype(candidate[0].dtype)
    to_candidate, to_o = ([t.new_empty(t.shape, dtype=dtype) for t in tensors] for tensors in (candidate, observed))
    if images is None:
        return to_candidate, to_o if to_observed else [], candidate[0].new_empty(0, dtype=dtype)
    to_images = images.new_empty(images.shape, dtype=accumulation_dtype(images.dtype))
    return to_candidate, to_o if to_observed else [], to_images

"""`matching_loss`: how far T trials' gradients are from the observed ones, and how rough their images, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import check_matching_loss
from .gradients import needs_gradient
from .reference import accumulation_dtype
from .schemas import NAMESPACE

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
    ordinary PyTorch operators, which costs their memory; not under the transforms of `torch.func`. On the CPU, where
    all of candidate and none of observed require gradients, these are made together with the loss, and take their
    memory from then on.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, unknown kind, bad weights, several devices.
        TypeError: dtypes that are not supported or differ from each other.
    """
    try:
        loss: Tensor = torch.ops.r2f.matching_loss.default(
            candidate, observed, shares(len(candidate), weights), check_kind(kind), images, tv_weight, isotropic
        )[0]
    except Exception:
        check_matching_loss(candidate, observed, images)  # says which argument is wrong and how
        raise
    return loss


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


# Autograd, on any device. The compiled module brings its own for matching_loss on CPU and CUDA, without Python
# (csrc/torch/matching_loss_autograd.cpp).


class _MatchingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, settings: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.count, ctx.settings = count, settings
        candidate, observed, images = tensors[:count], tensors[count:-1], tensors[-1]
        weights, kind, *rest = settings
        with torch._C._AutoDispatchBelowAutograd():
            loss, sums = torch.ops.r2f.matching_loss.default(candidate, observed, weights, kind, images, *rest)
        ctx.save_for_backward(sums, *tensors)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Any, ...]:
        (sums, *tensors, images), count = ctx.saved_tensors, ctx.count
        candidate, observed = tensors[:count], tensors[count:]
        weights, kind, *rest = ctx.settings
        to_observed = any(ctx.needs_input_grad[2 + count : -1])
        to_c, to_o, to_images = torch.ops.r2f.matching_loss_backward.default(
            grad_loss, candidate, observed, sums, weights, kind, images, *rest, to_observed
        )
        gradients = [g.to(t.dtype) for g, t in zip([*to_c, *to_o], tensors, strict=False)]
        gradients += [None] * (len(tensors) - len(gradients))
        return None, None, *gradients, None if images is None else to_images.to(images.dtype)


def _with_gradient(
    candidate: list[Tensor], observed: list[Tensor], weights: list[float], kind: str, images: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor]
    result = _MatchingLoss.apply(len(candidate), (weights, kind, *rest), *candidate, *observed, images)
    return result


def _backward_with_gradient(
    grad_loss: Tensor, candidate: list[Tensor], observed: list[Tensor], sums: Tensor, *settings: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Where a graph of the gradient is wanted, it and the sums are made of operators that autograd knows."""
    if needs_gradient(grad_loss, *candidate, *observed, settings[2]):
        sums = reference.matching_sums(candidate, observed)
        return reference.matching_loss_backward(grad_loss, candidate, observed, sums, *settings)
    result: tuple[list[Tensor], list[Tensor], Tensor]
    with torch._C._AutoDispatchBelowAutograd():
        result = torch.ops.r2f.matching_loss_backward.default(grad_loss, candidate, observed, sums, *settings)
    return result


_AUTOGRAD = torch.library.Library(NAMESPACE, "FRAGMENT")
_AUTOGRAD.impl("matching_loss", _with_gradient, "Autograd")
_AUTOGRAD.impl("matching_loss_backward", _backward_with_gradient, "Autograd")


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
    check_matching_loss(candidate, observed, images)
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

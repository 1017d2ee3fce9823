"""`matching_loss`: the distance of T trials' gradients from observed ones plus their images' total variation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from . import reference
from .checks import check_matching_loss
from .reference import accumulation_dtype
from .schemas import NAMESPACE

KINDS = ("layer_cosine", "cosine", "l2")


def matching_loss(
    candidate: Sequence[Tensor],
    observed: Sequence[Tensor],
    *,
    images: Tensor,
    weights: Sequence[float] | None = None,
    kind: str = "layer_cosine",
    tv_weight: float = 0.0,
    isotropic: bool = False,
) -> Tensor:
    """Distance between lists of gradients plus `tv_weight` times the images' total variation, trial by trial: [T].

    With c_l, o_l the candidate and observed gradient of layer l, and w_l its weight divided by the sum of the weights,
    the distance is one of

        layer_cosine   sum_l w_l (1 - <c_l, o_l> / (|c_l| |o_l|))
        cosine         1 - sum_l w_l <c_l, o_l> / sqrt(sum_l w_l |c_l|^2  sum_l w_l |o_l|^2)
        l2             sum_l w_l |c_l - o_l|^2

    `cosine` with equal weights is Geiping et al., "Inverting Gradients", NeurIPS 2020, Eq. 4. A gradient of norm zero
    has cosine 0 with any other, and derivative 0. With dy = x[i+1, j] - x[i, j] and dx = x[i, j+1] - x[i, j], the total
    variation (Rudin, Osher and Fatemi, 1992) of an image is

        anisotropic (default)   mean |dy| + mean |dx|, each over the pairs of neighbors; 0 if there are none
        isotropic               mean over channels and pixels of sqrt(dx^2 + dy^2 + 1e-12), with dx = 0 in the last
                                column and dy = 0 in the last row

    Shapes (L layers):
        candidate  L tensors [T, ...]
        observed   L tensors of the same shapes, or [1, ...] for all trials
        images     [T, c, h, w]
        weights    L numbers >= 0, not all zero; None: all equal

    Gradients share one dtype: float32, float64 or bfloat16; images have any of these. Blocks of elements are summed in
    float32 (guarded against underflow and overflow), everything else in float64; the loss is float32 (for float64
    inputs all is float64). Any strides. Deterministic.

    Differentiable in candidate and images; observed is a constant. The second derivative is computed by ordinary
    PyTorch operators and takes the memory that they need. Not supported under the transforms of `torch.func` or with
    `is_grads_batched`. On the CPU, if every candidate requires a gradient, the gradients are computed together with the
    loss, in one pass over memory.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, unknown kind, bad weights, several devices; in
            the backward, if observed requires a gradient.
        TypeError: dtypes that are not supported or differ from each other.
    """
    try:
        with_gradients = (
            candidate[0].is_cpu
            and torch.is_grad_enabled()
            and all(c.requires_grad for c in candidate)
            and not torch.compiler.is_compiling()
        )
        loss: Tensor = torch.ops.r2f.matching_loss.default(
            candidate,
            observed,
            normalized_weights(len(candidate), weights),
            check_kind(kind),
            images,
            tv_weight,
            isotropic,
            with_gradients,
        )[0]
    except Exception:
        check_matching_loss(candidate, observed, images)  # raises an error that names the argument
        raise
    return loss


def normalized_weights(count: int, weights: Sequence[float] | None) -> list[float]:
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


def check_constant(op: str, needs_gradient: Sequence[bool]) -> None:
    """Raises ValueError if the backward would have to compute a gradient of `observed`."""
    if any(needs_gradient):
        raise ValueError(f"{op}: observed is a constant, but requires a gradient: pass observed.detach()")


def cast_like(gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in the dtypes of the inputs (bfloat16 inputs have float32 gradients)."""
    return [g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    candidate, observed, weights, kind, images, *settings, _ = inputs
    _, sums, *gradients = output
    flat_gradients = (*gradients[0], gradients[1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, *flat_gradients)
    ctx.save_for_backward(*candidate, *observed, images, sums, *flat_gradients)
    ctx.count, ctx.weights, ctx.kind, ctx.settings = len(candidate), weights, kind, settings


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    count = ctx.count
    to_candidate: list[Tensor | None] = [None] * count
    to_images = None
    check_constant("matching_loss", ctx.needs_input_grad[1])
    if grad_loss is not None:
        saved = ctx.saved_tensors  # read once: activation checkpointing unpacks a saved tensor once
        candidate, observed = saved[:count], saved[count : 2 * count]
        images, sums, *gradients, grad_images = saved[2 * count :]
        if torch.is_grad_enabled() or not gradients or not _can_reuse(grad_loss):
            if torch.is_grad_enabled():  # differentiable operators, so that the gradient has a graph
                backward, sums = reference.matching_loss_backward, reference.matching_sums(candidate, observed)
            else:
                backward = torch.ops.r2f.matching_loss_backward.default
            gradients, grad_images = backward(
                grad_loss, candidate, observed, sums, ctx.weights, ctx.kind, images, *ctx.settings
            )
        to_candidate = list(cast_like(gradients, candidate))
        to_images = grad_images.to(images.dtype) if ctx.needs_input_grad[4] else None
    return to_candidate, [None] * count, None, None, to_images, None, None, None


def _can_reuse(grad_loss: Tensor) -> bool:
    """Whether the backward can return the gradients that the forward computed: every loss has gradient 1, and the graph
    is freed after this backward, so that nothing else refers to them.

    Two private functions of PyTorch answer that. In a version that lacks one of them nothing is reused, and the
    backward computes the gradients again.
    """
    dispatch_mode = getattr(_python_dispatch, "_get_current_dispatch_mode", None)
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return (
        dispatch_mode is not None
        and keeps_graph is not None
        and type(grad_loss) is Tensor
        and grad_loss.is_cpu
        and dispatch_mode() is None  # while tracing, values cannot be read
        and not keeps_graph()
        and bool((grad_loss == 1).all())
    )


torch.library.register_autograd(f"{NAMESPACE}::matching_loss", _backward, setup_context=_setup_context)


@torch.library.register_fake(f"{NAMESPACE}::matching_loss")
def _fake(
    candidate: list[Tensor], observed: list[Tensor], _weights: list[float], _kind: str, images: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    check_matching_loss(candidate, observed, images)
    first = candidate[0]
    loss = first.new_empty(first.shape[:1], dtype=accumulation_dtype(first.dtype))
    sums = first.new_empty((len(candidate), first.shape[0], 4), dtype=torch.float64)
    *_, with_gradients = settings
    if with_gradients:
        return loss, sums, empty_gradients(candidate), empty_gradients([images])[0]
    return loss, sums, [], images.new_empty(0, dtype=accumulation_dtype(images.dtype))


@torch.library.register_fake(f"{NAMESPACE}::matching_loss_backward")
def _fake_backward(_: Tensor, candidate: list[Tensor], *inputs: Any) -> tuple[list[Tensor], Tensor]:
    _observed, _sums, _weights, _kind, images, *_settings = inputs
    return empty_gradients(candidate), empty_gradients([images])[0]


def empty_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialized gradients, contiguous and in the accumulation type."""
    return [t.new_empty(t.shape, dtype=accumulation_dtype(t.dtype)) for t in tensors]

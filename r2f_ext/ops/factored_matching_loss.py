"""`factored_matching_loss`: how far T trials' gradients, given as factors, are from observed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import DTYPES
from .matching_loss import check_kind, shares
from .reference import accumulation_dtype
from .schemas import NAMESPACE


def factored_matching_loss(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    observed: Sequence[Tensor],
    observed_delta: Sequence[Tensor] | None = None,
    *,
    weights: Sequence[float] | None = None,
    kind: str = "layer_cosine",
) -> Tensor:
    """`matching_loss` of the gradients G_l = delta_l^T x_l [T, d_out, d_in], which are never formed: [T].

    With G* the observed gradient of a layer, or its factors x*, delta*:

        <G, G*> = sum_n delta_n^T G* x_n,   or   sum (delta delta*^T) o (x x*^T)
        |G|^2   = sum (delta delta^T) o (x x^T), not below 0

    Kinds and weights are those of `matching_loss`. `l2` takes |G - G*|^2 from these three numbers: where G comes so
    close to G* that it is below about 1e-6 (|G|^2 + |G*|^2) in float32 (1e-14 in float64), nothing is left of it but
    rounding.

    Shapes (L layers, N tokens):
        x               L tensors [T, N, d_in]
        delta           L tensors [T, N, d_out]
        observed        L tensors [T, d_out, d_in], or with observed_delta L tensors x* [T, M, d_in]; 1 for T: for all
        observed_delta  L tensors delta* [T, M, d_out], or [1, M, d_out], or None
        weights         L numbers >= 0, not all zero; None: all equal

    All share one dtype: float32, float64 or bfloat16. Products are taken in float32 (float64 for float64), of deltas
    scaled so that squares of 1e-28 to 1e9 are in range; sums over tokens and layers in float64. The loss is float32
    (float64 for float64). Any strides. Deterministic. Differentiable in all four: in x and delta by one call of the
    kernels; in the others, and twice, through ordinary PyTorch operators.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, unknown kind, bad weights, several devices.
        TypeError: dtypes that are not supported or differ from each other.
    """
    _check(x, delta, observed, observed_delta)
    counts = (len(x), 0 if observed_delta is None else len(x))
    tensors = (*x, *delta, *observed, *(observed_delta or ()))
    loss: Tensor = _FactoredMatchingLoss.apply(counts, shares(len(x), weights), check_kind(kind), *tensors)
    return loss


def _check(
    x: Sequence[Tensor], delta: Sequence[Tensor], observed: Sequence[Tensor], observed_delta: Sequence[Tensor] | None
) -> None:
    """Runs on every call, so it touches each shape once."""
    count = len(x)
    if not x or len(delta) != count or len(observed) != count or len(observed_delta or x) != count:
        raise ValueError(
            "factored_matching_loss: x, delta, observed and observed_delta must be lists of the same length, at least "
            f"1; got {count}, {len(delta)}, {len(observed)}" + (f", {len(observed_delta)}" if observed_delta else "")
        )
    dtype, device = x[0].dtype, x[0].device
    if dtype not in DTYPES:
        raise TypeError(f"factored_matching_loss: x must be float32, float64 or bfloat16; got {dtype}")
    trials = x[0].shape[:1]
    for i in range(count):
        x_shape, d_shape, o_shape = x[i].shape, delta[i].shape, observed[i].shape
        if len(x_shape) != 3 or x_shape[:1] != trials or len(d_shape) != 3 or d_shape[:2] != x_shape[:2]:
            raise ValueError(
                "factored_matching_loss: x must be tensors [T, N, d_in] and delta [T, N, d_out]; "
                f"tensor {i} is {list(x_shape)} and {list(d_shape)}, T = {list(trials)}"
            )
        if observed_delta is None:
            fits, words = o_shape[1:] == (d_shape[2], x_shape[2]), "observed must be tensors [T, d_out, d_in]"
        else:
            star = observed_delta[i].shape
            fits = len(o_shape) == 3 and o_shape[2] == x_shape[2] and star == (*o_shape[:2], d_shape[2])
            words = "observed must be tensors [T, M, d_in] and observed_delta [T, M, d_out]"
        if not fits or (o_shape[:1] != trials and o_shape[0] != 1):
            raise ValueError(f"factored_matching_loss: {words}, or 1 for T; tensor {i} is {list(o_shape)}")
        given = (
            (x[i], delta[i], observed[i])
            if observed_delta is None
            else (x[i], delta[i], observed[i], observed_delta[i])
        )
        for tensor in given:
            if tensor.dtype != dtype:
                raise TypeError(
                    "factored_matching_loss: x, delta, observed and observed_delta must share one dtype; "
                    f"layer {i} has {tensor.dtype} and x {dtype}"
                )
            if tensor.device != device:
                raise ValueError(
                    f"factored_matching_loss: all tensors must be on one device; layer {i} is not on {device}"
                )


class _FactoredMatchingLoss(torch.autograd.Function):
    """A Function around the raw operators: for lists of tensors `register_autograd` costs twice the time a call."""

    @staticmethod
    def forward(ctx: Any, counts: tuple[int, int], weights: list[float], kind: str, *tensors: Tensor) -> Tensor:
        ctx.counts, ctx.weights, ctx.kind = counts, weights, kind
        lists, _ = _split(counts[0], tensors, 3 * counts[0] + counts[1])
        loss, sums, products = torch.ops.r2f.factored_matching_loss.default(*lists, weights, kind)
        ctx.save_for_backward(*tensors, *products, sums)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        count, factored = ctx.counts
        *tensors, sums = ctx.saved_tensors
        given = 3 * count + factored
        (x, delta, observed, observed_delta), products = _split(count, tensors, given)
        settings = (ctx.weights, ctx.kind)
        to_observed_and_delta: list[Tensor | None] = [None] * (count + factored)
        to_observed = any(ctx.needs_input_grad[3 + 2 * count :])
        if not torch.is_grad_enabled() and not to_observed:
            to_x, to_delta = torch.ops.r2f.factored_matching_loss_backward.default(
                grad_loss, x, delta, observed, observed_delta, sums, products, *settings
            )
        else:  # of operators that can be differentiated again, and so must the sums be
            sums = reference.factored_sums(x, delta, observed, observed_delta)
            to_x, to_delta = reference.factored_matching_loss_backward(
                grad_loss, x, delta, observed, observed_delta, sums, products, *settings
            )
        if to_observed:
            to_observed_and_delta = _observed_gradients(grad_loss, x, delta, observed, observed_delta, sums, *settings)
        if x[0].dtype == torch.bfloat16:
            to_x, to_delta = ([t.to(torch.bfloat16) for t in grads] for grads in (to_x, to_delta))
        return None, None, None, *to_x, *to_delta, *to_observed_and_delta


def _split(count: int, tensors: Sequence[Tensor], given: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    """x, delta, observed, observed_delta (perhaps empty), and what follows the `given` tensors."""
    lists = [list(tensors[k * count : (k + 1) * count]) for k in range(3)]
    return [*lists, list(tensors[3 * count : given])], list(tensors[given:])


def _observed_gradients(
    grad_loss: Tensor,
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    observed: Sequence[Tensor],
    observed_delta: Sequence[Tensor],
    sums: Tensor,
    weights: list[float],
    kind: str,
) -> list[Tensor | None]:
    """dL/dG* = a G + b_o G*, and from it those of its factors. Rarely wanted, so in plain PyTorch."""
    a, _, b_o = (
        (grad_loss.double() * k)[..., None, None] for k in reference.matching_coefficients(sums, weights, kind)
    )
    to_observed, to_delta = [], []
    for i, (x_l, d, o) in enumerate(zip(x, delta, observed, strict=True)):
        x_l, d, star = x_l.double(), d.double(), o.double()
        if observed_delta:
            star_d = observed_delta[i].double()
            to_x = a[i] * ((star_d @ d.mT) @ x_l) + b_o[i] * ((star_d @ star_d.mT) @ star)
            to_d = a[i] * ((star @ x_l.mT) @ d) + b_o[i] * ((star @ star.mT) @ star_d)
            to_observed.append(to_x.sum_to_size(o.shape).to(o.dtype))
            to_delta.append(to_d.sum_to_size(star_d.shape).to(o.dtype))
        else:
            to_observed.append((a[i] * (d.mT @ x_l) + b_o[i] * star).sum_to_size(o.shape).to(o.dtype))
    return [*to_observed, *to_delta]


@torch.library.register_fake(f"{NAMESPACE}::factored_matching_loss")
def _fake(
    x: list[Tensor],
    delta: list[Tensor],
    observed: list[Tensor],
    observed_delta: list[Tensor],
    weights: list[float],
    kind: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    trials, dtype = x[0].shape[0], accumulation_dtype(x[0].dtype)
    products = [] if observed_delta else [t.new_empty(t.shape, dtype=dtype) for t in x]
    return x[0].new_empty(trials, dtype=dtype), x[0].new_empty((len(x), trials, 4), dtype=torch.float64), products


@torch.library.register_fake(f"{NAMESPACE}::factored_matching_loss_backward")
def _fake_backward(
    grad_loss: Tensor,
    x: list[Tensor],
    delta: list[Tensor],
    observed: list[Tensor],
    observed_delta: list[Tensor],
    sums: Tensor,
    products: list[Tensor],
    weights: list[float],
    kind: str,
) -> tuple[list[Tensor], list[Tensor]]:
    dtype = accumulation_dtype(x[0].dtype)
    grads = [[t.new_empty(t.shape, dtype=dtype) for t in tensors] for tensors in (x, delta)]
    return grads[0], grads[1]

"""`decoder_cosine_loss`: how far decoded gradients are from true ones given as factors, neither ever written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import DTYPES
from .decode import Layers
from .reference import accumulation_dtype
from .schemas import NAMESPACE


class DecoderSums(NamedTuple):
    """Of each layer and sample [L, b], float64: what a cosine, a log-norm or a squared error is made of.

    |decoded - true|^2 = square - 2 inner + true_square, which cancels where the two come close.
    """

    inner: Tensor
    square: Tensor
    true_square: Tensor


def decoder_sums(coefficients: Layers, bases: Layers, x: Layers, delta: Layers) -> DecoderSums:
    """<decoded, true>, |decoded|^2 and |true|^2 of decoded = c basis and true = flattened delta^T x.

    Made tile by tile: of each layer some rows of both gradients exist at a time. The backward makes them again.

    Shapes (layers l of any sizes; N tokens):
        coefficients  L tensors [b, k_l], or one [L, b, k]: what `decode` gives without bases
        bases         L tensors [k_l, d_out d_in], or one [L, k, d_out d_in]; without bases: W^T of the last map
        x             L tensors [b, N, d_in], or one [L, b, N, d_in]
        delta         L tensors [b, N, d_out], or one [L, b, N, d_out]
        returns       three tensors [L, b], float64

    All share one dtype: float32, float64 or bfloat16. Products are taken in float32 (float64 for float64), of deltas
    scaled so that squares of 1e-28 to 1e9 are in range; sums in float64. Any strides. Deterministic. Differentiable
    once, in coefficients and bases; x and delta are targets and get no gradient.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, several devices, targets that require gradients.
        TypeError: dtypes that are not supported or differ from each other.
    """
    lists = [list(each) for each in (coefficients, bases, x, delta)]
    _check(*lists)
    sums: Tensor = _DecoderSums.apply(len(lists[0]), *(tensor for each in lists for tensor in each))
    return DecoderSums(*sums.unbind(-1))


def decoder_cosine_loss(coefficients: Layers, bases: Layers, x: Layers, delta: Layers) -> tuple[Tensor, DecoderSums]:
    """1 - cos(c basis, delta^T x) of each layer and sample [L, b], float32 (float64 for float64), and the sums.

    Arguments, precision and errors are those of `decoder_sums`. The direction of nothing has cosine 0 and no gradient.
    """
    sums = decoder_sums(coefficients, bases, x, delta)
    nothing = (sums.square == 0) | (sums.true_square == 0)
    norms = torch.where(nothing, 1.0, sums.square).sqrt() * torch.where(nothing, 1.0, sums.true_square).sqrt()
    cosine = torch.where(nothing, 0.0, sums.inner / norms)
    return (1 - cosine).to(accumulation_dtype(x[0].dtype)), sums


def _check(coefficients: list[Tensor], bases: list[Tensor], x: list[Tensor], delta: list[Tensor]) -> None:
    """Runs on every call, so it touches each shape once."""
    count = len(coefficients)
    if not coefficients or not count == len(bases) == len(x) == len(delta):
        raise ValueError(
            "decoder_sums: coefficients, bases, x and delta must have the same number of layers, at least 1; "
            f"got {count}, {len(bases)}, {len(x)}, {len(delta)}"
        )
    dtype, device, batch = x[0].dtype, x[0].device, coefficients[0].shape[:1]
    if dtype not in DTYPES:
        raise TypeError(f"decoder_sums: x must be float32, float64 or bfloat16; got {dtype}")
    for layer, tensors in enumerate(zip(coefficients, bases, x, delta, strict=True)):
        c, basis, x_l, d = (tensor.shape for tensor in tensors)
        if len(x_l) != 3 or len(d) != 3 or x_l[:2] != d[:2] or x_l[:1] != batch:
            raise ValueError(
                f"decoder_sums: x must be [b, N, d_in], delta [b, N, d_out]; layer {layer} has {list(x_l)}, {list(d)}"
            )
        if len(c) != 2 or c[:1] != batch or tuple(basis) != (c[1], d[2] * x_l[2]):
            raise ValueError(
                "decoder_sums: coefficients must be [b, k] and bases [k, d_out d_in]; "
                f"layer {layer} has {list(c)} and {list(basis)}, with d_out {d[2]} and d_in {x_l[2]}"
            )
        if any(tensor.dtype != dtype for tensor in tensors):
            given = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
            raise TypeError(f"decoder_sums: all tensors must share one dtype; layer {layer} has {given}")
        if any(tensor.device != device for tensor in tensors):
            raise ValueError(f"decoder_sums: all tensors must be on one device; layer {layer} has others")
        if tensors[2].requires_grad or tensors[3].requires_grad:
            raise ValueError("decoder_sums: x and delta are targets: detach them")


class _DecoderSums(torch.autograd.Function):
    """A Function around the raw operators: for lists of tensors `register_autograd` costs twice the time a call."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.count = count
        ctx.save_for_backward(*tensors)
        sums: Tensor = torch.ops.r2f.decoder_sums.default(*_split(count, tensors))
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Any, ...]:
        count = ctx.count
        lists = _split(count, ctx.saved_tensors)
        to_bases = any(ctx.needs_input_grad[1 + count : 1 + 2 * count])
        to_c, to_basis = torch.ops.r2f.decoder_sums_backward.default(grad_sums, *lists, to_bases)
        dtype = lists[0][0].dtype
        grads: list[Tensor | None] = [g.to(dtype) for g in (*to_c, *to_basis)]
        return None, *grads, *[None] * (4 * count - len(grads))


def _split(count: int, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    return [list(tensors[k * count : (k + 1) * count]) for k in range(4)]


@torch.library.register_fake(f"{NAMESPACE}::decoder_sums")
def _fake(coefficients: list[Tensor], bases: list[Tensor], x: list[Tensor], delta: list[Tensor]) -> Tensor:
    return x[0].new_empty((len(x), x[0].shape[0], 3), dtype=torch.float64)


@torch.library.register_fake(f"{NAMESPACE}::decoder_sums_backward")
def _fake_backward(
    grad_sums: Tensor,
    coefficients: list[Tensor],
    bases: list[Tensor],
    x: list[Tensor],
    delta: list[Tensor],
    to_bases: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    dtype = accumulation_dtype(x[0].dtype)
    to_c, to_basis = ([t.new_empty(t.shape, dtype=dtype) for t in tensors] for tensors in (coefficients, bases))
    return to_c, to_basis if to_bases else []

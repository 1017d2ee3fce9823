"""`add_weighted_gradients_`: weighted sums of the factored gradients of many pairs, for all layers in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_add_weighted_gradients
from .schemas import NAMESPACE


def add_weighted_gradients_(
    totals: Sequence[Tensor], weights: Sequence[Tensor], x: Sequence[Tensor], delta: Sequence[Tensor]
) -> None:
    """totals[l][v] += sum_p weights[l][v, p] G_p with G_p = delta[l][p]^T x[l][p], for every layer l, in place.

    Shapes (V sums over P pairs of N tokens each):
        totals   L tensors [V, d_out, d_in], contiguous; overwritten
        weights  L tensors [V, P]
        x        L tensors [P, N, d_in]
        delta    L tensors [P, N, d_out]

    x and delta share one dtype of float32, float64 or bfloat16; totals and weights are float32 (float64 for float64),
    in which all sums are taken. Not differentiable.

    Each layer is computed in one of two forms, by the library's products. In multiply-adds per entry of a pair's dense
    gradient they cost:

        V N            for each v one product (w_v delta)^T x over the tokens of all pairs: no gradient is formed
        N + V + 64     the dense gradients of a chunk of pairs, once for all v, then one product with the weights;
                       64 stands for writing a gradient's entry to memory and reading it back: 8 bytes, at about 8
                       multiply-adds in the time that a processor or GPU takes to move one byte

    The cheaper form is used, the first if both cost the same; with a single victim (V = 1) no gradient is ever formed.
    Both forms process the pairs in chunks whose temporary tensors hold at most 2^25 elements (128 MiB in float32), or a
    single pair if that is larger.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, totals that are not contiguous, several devices.
        TypeError: dtypes that are not supported or do not go together.
    """
    try:
        with torch.no_grad():
            torch.ops.r2f.add_weighted_gradients_(totals, weights, x, delta)
    except Exception:
        check_add_weighted_gradients(totals, weights, x, delta)  # raises an error that names the argument
        raise


@torch.library.register_fake(f"{NAMESPACE}::add_weighted_gradients_")
def _fake(totals: list[Tensor], weights: list[Tensor], x: list[Tensor], delta: list[Tensor]) -> None:
    check_add_weighted_gradients(totals, weights, x, delta)

"""Linear algebra shared by decoders and inversion."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK = 1000


def gram(rows: Tensor) -> Tensor:
    """rows @ rows.T [n, n] of rows [n, k]; only the blocks on and below the diagonal are computed, then mirrored."""
    count = len(rows)
    result = rows.new_empty(count, count)
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        torch.mm(rows[first:], rows[first:last].mT, out=result[first:, first:last])
        result[first:last, last:] = result[last:, first:last].mT
    return result


def sum_in_place(terms: Iterable[Tensor]) -> Tensor:
    """Sum of freshly made tensors, accumulated in the first."""
    iterator = iter(terms)
    total = next(iterator)
    for term in iterator:
        total += term
    return total

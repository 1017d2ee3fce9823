"""Low-dimensional coordinates of a layer's gradients: principal directions of rows and columns.

G ~= L C R^T, where L [d_out, p] and R [d_in, q] are the leading eigenvectors of sum G G^T and sum G^T G over pairs
scaled to unit update norm (two-dimensional PCA; Ye 2005). The core C = L^T G R = (D L)^T (X R) [p, q] is computed from
the factors of the gradient. It is the output of the trained decoders, and the 2-D input of the convolutional ones,
because its rows and columns are ordered by variance.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from r2f_ext.decoders.base import unit_updates
from r2f_ext.pairs import PairSource
from r2f_ext.types import FactoredGradient

SAMPLE = 300  # pairs that the directions are estimated from; more do not change them noticeably


class Core:
    """left[name] [d_out, p] and right[name] [d_in, q] with orthonormal columns; p, q <= the `size` passed to `of`."""

    def __init__(self, left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
        self.left, self.right = left, right

    @classmethod
    def of(cls, pairs: PairSource, count: int, size: int) -> Core:
        """Estimate the directions from the first min(SAMPLE, count) pairs."""
        rows: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        for batch in pairs.batches(0, min(SAMPLE, count)):
            _, norms = unit_updates({name: batch.updates[name] for name in pairs.target.names})
            for name, norm in norms.items():
                gradient = batch.gradients.dense(name) / norm[:, None, None]
                square_rows = torch.einsum("pij,pkj->ik", gradient, gradient)
                square_columns = torch.einsum("pij,pik->jk", gradient, gradient)
                rows[name] = rows[name] + square_rows if name in rows else square_rows
                columns[name] = columns[name] + square_columns if name in columns else square_columns
        return cls(
            {name: _leading(square, size) for name, square in rows.items()},
            {name: _leading(square, size) for name, square in columns.items()},
        )

    @classmethod
    def of_state(cls, state: dict[str, Tensor], names: Iterable[str]) -> Core:
        """The part of a `state` that belongs to the layers `names`."""
        names = tuple(names)
        return cls({n: state[f"left/{n}"] for n in names}, {n: state[f"right/{n}"] for n in names})

    def state(self) -> dict[str, Tensor]:
        """The tensors to save, by name."""
        sides = (("left", self.left), ("right", self.right))
        return {f"{side}/{name}": vectors for side, each in sides for name, vectors in each.items()}

    def __call__(self, gradients: FactoredGradient) -> dict[str, Tensor]:
        """P gradients -> name -> cores [P, p, q]."""
        return {
            name: (gradients.delta[name] @ left).mT @ (gradients.x[name] @ self.right[name])
            for name, left in self.left.items()
        }

    def expand(self, cores: dict[str, Tensor]) -> dict[str, Tensor]:
        """name -> cores [P, p, q] -> name -> gradients L C R^T [P, d_out, d_in]."""
        return {name: self.left[name] @ core @ self.right[name].mT for name, core in cores.items()}


def _leading(square: Tensor, size: int) -> Tensor:
    """The `size` leading eigenvectors as columns, signs fixed so that the largest entry is positive."""
    vectors = torch.linalg.eigh(square.double())[1].flip(1)[:, :size]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).to(square.dtype)

"""A layer's gradients in few numbers: their principal directions on both sides.

G ~= L C R^T with L [d_out, p] and R [d_in, q] the leading eigenvectors of sum G G^T and sum G^T G over pairs of unit
update (two-dimensional PCA; Ye 2005). The core C = L^T G R = (D L)^T (X R) [p, q] comes from a gradient's factors, and
serves the decoders that learn as their output and, on a 2-D grid whose order then means something, as their image.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from r2f_ext.decoders.base import unit_updates
from r2f_ext.pairs import PairSource
from r2f_ext.types import FactoredGradient

SAMPLE = 300  # pairs that the directions come from: a covariance of at most d x d numbers needs no more


class Core:
    """left[name] [d_out, p], right[name] [d_in, q], orthonormal columns, p and q at most `size`."""

    def __init__(self, left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
        self.left, self.right = left, right

    @classmethod
    def of(cls, pairs: PairSource, count: int, size: int) -> Core:
        """From the first min(SAMPLE, count) pairs."""
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
        """What is saved: name -> tensor."""
        sides = (("left", self.left), ("right", self.right))
        return {f"{side}/{name}": vectors for side, each in sides for name, vectors in each.items()}

    def __call__(self, gradients: FactoredGradient) -> dict[str, Tensor]:
        """name -> cores [P, p, q] of P gradients."""
        return {
            name: (gradients.delta[name] @ left).mT @ (gradients.x[name] @ self.right[name])
            for name, left in self.left.items()
        }

    def expand(self, cores: dict[str, Tensor]) -> dict[str, Tensor]:
        """name -> gradients L C R^T [P, d_out, d_in]."""
        return {name: self.left[name] @ core @ self.right[name].mT for name, core in cores.items()}


def _leading(square: Tensor, size: int) -> Tensor:
    """The `size` leading eigenvectors as columns, signs fixed so that the largest entry is positive."""
    vectors = torch.linalg.eigh(square.double())[1].flip(1)[:, :size]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).to(square.dtype)

"""One matrix [r, d_in] shared by all rows of a layer: the linear minimum-mean-square-error estimate of a row."""

from __future__ import annotations

import torch

from r2f_ext.decoders.base import MatrixDecoder, unit_updates
from r2f_ext.kernel_solver import RidgeSystem
from r2f_ext.pairs import PairSource
from r2f_ext.types import PairBatch

RIDGE = 1e-6  # relative to the mean diagonal; the r x r normal equations are well conditioned


class RowLMMSE(MatrixDecoder):
    """One matrix per layer, M = (Z^T Z + lam I)^-1 Z^T G, of the rows Z of unit updates and those of gradients G."""

    kind = "row_lmmse"

    def start(self, pairs: PairSource, count: int) -> None:
        def zeros(rows: int, columns: int) -> torch.Tensor:
            return torch.zeros(rows, columns, dtype=torch.float64, device=pairs.target.base.device)

        self.left = {layer.name: zeros(layer.rank, layer.rank) for layer in pairs.target.layers}
        self.right = {layer.name: zeros(layer.rank, layer.d_in) for layer in pairs.target.layers}

    def observe(self, batch: PairBatch) -> None:
        """Accumulate the normal equations over all rows of all pairs, each pair scaled to a unit update."""
        units, norms = unit_updates({name: batch.updates[name] for name in self.left})
        for name, unit in units.items():
            rows = unit.flatten(0, 1)
            exact = rows.double()  # with fewer rows than columns some eigenvalues are 0; float32 rounds them below 0
            self.left[name] += exact.mT @ exact
            # sum_p Z_p^T G_p = sum_p (D_p Z_p)^T X_p avoids forming G.
            tokens = batch.gradients.delta[name] @ (unit / norms[name][:, None, None])
            self.right[name] += (tokens.flatten(0, 1).mT @ batch.gradients.x[name].flatten(0, 1)).double()

    def finish(self) -> None:
        self.matrices = {
            name: RidgeSystem.of(left, RIDGE * float(left.diagonal().mean())).solve(self.right[name]).float()
            for name, left in self.left.items()
        }

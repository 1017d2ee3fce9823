"""One linear map r -> d_in shared by all rows of a layer: the linear minimum-mean-square-error estimate of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from r2f_ext.decoders.base import Decoder, Updates
from r2f_ext.pairs import PairSource
from r2f_ext.types import Gradient, PairBatch

RIDGE = 1e-6  # relative to the mean diagonal: the r x r normal equations need next to none


class RowLMMSE(Decoder):
    kind = "row_lmmse"

    def start(self, pairs: PairSource, count: int) -> None:
        device = pairs.target.base.device
        self.left = {
            layer.name: torch.zeros(layer.rank, layer.rank, dtype=torch.float64, device=device)
            for layer in pairs.target.layers
        }
        self.right = {
            layer.name: torch.zeros(layer.rank, layer.d_in, dtype=torch.float64, device=device)
            for layer in pairs.target.layers
        }

    def observe(self, batch: PairBatch) -> None:
        """Add to the normal equations over all rows of all pairs, each pair scaled to a unit update."""
        for name in self.left:
            update = batch.updates[name]
            norm = update.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
            unit = update / norm
            rows = unit.flatten(0, 1)
            self.left[name] += (rows.mT @ rows).double()
            # sum_p Z_p^T G_p = sum_p (D_p Z_p)^T X_p: G is never formed.
            tokens = batch.gradients.delta[name] @ (unit / norm)
            self.right[name] += (tokens.flatten(0, 1).mT @ batch.gradients.x[name].flatten(0, 1)).double()

    def finish(self) -> None:
        self.maps = {}
        for name, gram in self.left.items():
            damped = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            self.maps[name] = torch.linalg.solve(damped, self.right[name]).float()

    def decode(self, updates: Updates) -> Gradient:
        return Gradient({name: updates[name] @ each.to(updates[name].device) for name, each in self.maps.items()})

    def state(self) -> dict[str, Tensor]:
        return dict(self.maps)

    def load_state(self, state: dict[str, Tensor], pairs: PairSource) -> None:
        self.maps = {name: state[name] for name in pairs.target.names}

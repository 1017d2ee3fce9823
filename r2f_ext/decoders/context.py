"""A summary of all layers' updates of one sample in few numbers: a fixed random projection."""

from __future__ import annotations

import torch
from torch import Tensor

from r2f_ext.decoders.base import Updates
from r2f_ext.pairs import PairSource

SIZE = 512


class Context:
    """sum_l u_l M_l / L^(1/2) [b, size] of L layers' updates u_l, flat, with standard normal M_l: entries of about 1.

    Attributes:
        size: at most SIZE, and no more than the updates have numbers.
        widths: name -> numbers of a layer's update.
    """

    def __init__(self, pairs: PairSource, seed: int) -> None:
        (batch,) = pairs.batches(0, 1)
        self.widths = {name: u[0].numel() for name, u in batch.updates.items()}
        self.size = min(SIZE, sum(self.widths.values()))
        generator = torch.Generator().manual_seed(seed)
        self.projections = {
            name: (torch.randn(width, self.size, generator=generator) / len(self.widths) ** 0.5).to(u)
            for (name, width), u in zip(self.widths.items(), batch.updates.values(), strict=True)
        }

    def __call__(self, units: Updates) -> Tensor:
        """Of unit updates [b, ...]."""
        return torch.stack([unit.flatten(1) @ self.projections[name] for name, unit in units.items()]).sum(0)

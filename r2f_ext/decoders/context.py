"""A fixed random projection that summarises one sample's updates of all layers as a short vector."""

from __future__ import annotations

import torch
from torch import Tensor

from r2f_ext.decoders.base import Updates
from r2f_ext.pairs import PairSource

SIZE = 512


class Context:
    """sum_l u_l M_l / sqrt(L) [b, size], for flattened unit updates u_l of L layers and standard normal matrices M_l.

    Entries have a standard deviation of about 1.

    Attributes:
        size: SIZE, or the total number of update entries if that is smaller.
        widths: name -> number of entries in the layer's update.
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
        """name -> unit updates [b, ...] -> context [b, size]."""
        return torch.stack([unit.flatten(1) @ self.projections[name] for name, unit in units.items()]).sum(0)

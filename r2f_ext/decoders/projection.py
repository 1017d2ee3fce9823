"""G P_A, the part of the gradient that the update holds exactly: no training, the floor of every decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from r2f_ext.decoders.base import Decoder, Updates
from r2f_ext.pairs import PairSource
from r2f_ext.types import AdaptedLayer, Gradient, PairBatch


def projection_map(layer: AdaptedLayer, a: Tensor) -> Tensor:
    """M [r, d_in] with (s G A^T) M = G P_A, P_A the projection on A's row space (METHODS 1), in float64."""
    return torch.linalg.pinv(a.double()).mT / layer.scale


class Projection(Decoder):
    kind = "projection"

    def start(self, pairs: PairSource, count: int) -> None:
        self.maps = {layer.name: projection_map(layer, pairs.a[layer.name]).float() for layer in pairs.target.layers}

    def observe(self, batch: PairBatch) -> None:
        pass

    def finish(self) -> None:
        pass

    def decode(self, updates: Updates) -> Gradient:
        return Gradient({name: updates[name] @ each for name, each in self.maps.items()})

    def state(self) -> dict[str, Tensor]:
        return dict(self.maps)

    def load_state(self, state: dict[str, Tensor], pairs: PairSource) -> None:
        self.maps = {name: state[name] for name in pairs.target.names}

"""One multilayer perceptron a layer with a low-rank head, all in one call of the decoder operator.

It reads the layer's own update (or another form of it, see `inputs`) and a fixed random projection of all layers'
updates, and gives the coefficients of the layer's gradient in its core's directions (`Core`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r2f_ext.decoders.base import Updates
from r2f_ext.decoders.learned import Learned
from r2f_ext.errors import R2FError
from r2f_ext.ops import decode

SIZE, HIDDEN, SHARED = 48, 256, 512
INPUTS = ("b", "ba")


class MLP(Learned):
    kind = "mlp"
    size = SIZE
    learning_rate = 1e-3
    most_epochs = 20

    def __init__(self, loss: str = "cosine_norm", epochs: int | None = None, seed: int = 0, inputs: str = "b") -> None:
        """inputs: "b" reads B; "ba" reads the product BA, as B (A A^T)^(1/2), which has the same inner products.

        At B_0 = 0 one step leaves A as it was, so A says nothing about the sample and both hold the same.
        """
        super().__init__(loss, epochs, seed)
        if inputs not in INPUTS:
            raise R2FError(f"unknown inputs '{inputs}': choose {' or '.join(INPUTS)}.")
        self.form = inputs

    def prepare(self) -> None:
        self.roots = {name: _root(a.float()) for name, a in self.pairs.a.items()} if self.form == "ba" else {}
        (batch,) = self.pairs.batches(0, 1)
        self.widths = {name: u[0].numel() for name, u in batch.updates.items()}
        generator = torch.Generator().manual_seed(self.seed)
        self.shared = min(SHARED, sum(self.widths.values()))
        self.maps = {
            name: (torch.randn(width, self.shared, generator=generator) / len(self.widths) ** 0.5).to(u)
            for (name, width), u in zip(self.widths.items(), batch.updates.values(), strict=True)
        }

    def network(self, name: str, shape: torch.Size) -> nn.Module:
        width = self.widths[name] + self.shared
        return nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, shape.numel()))

    def predict(self, inputs: Updates) -> Updates:
        maps = [[m for m in self.networks[name].modules() if isinstance(m, nn.Linear)] for name in inputs]
        weights = [[linear.weight for linear in each] for each in zip(*maps, strict=True)]
        biases = [[linear.bias for linear in each] for each in zip(*maps, strict=True)]
        return dict(zip(inputs, decode(list(inputs.values()), weights, biases), strict=True))

    def read(self, units: Updates) -> Updates:
        """The layer's own update, scaled to entries of about 1, and the random projection of all."""
        if self.form == "ba":
            units = {name: unit @ self.roots[name] for name, unit in units.items()}
        flat = {name: unit.flatten(1) for name, unit in units.items()}
        shared = torch.stack([unit @ self.maps[name] for name, unit in flat.items()]).sum(0)
        return {n: torch.cat([flat[n] * flat[n].shape[1] ** 0.5, shared], dim=1) for n in self.pairs.target.names}


def _root(a: Tensor) -> Tensor:
    """(A A^T)^(1/2) [r, r] of A [r, d_in]: |B A| = |B (A A^T)^(1/2)|."""
    values, vectors = torch.linalg.eigh((a @ a.mT).double())
    return ((vectors * values.clamp_min(0).sqrt()) @ vectors.mT).float()

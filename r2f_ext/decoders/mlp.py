"""One multilayer perceptron per layer with a low-rank output; one call of the operator `perceptrons` runs all layers.

The input is the layer's own update (see `inputs` for its form) and the `Context`. The output is the gradient's core,
its coefficients in the principal directions (`Core`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r2f_ext.decoders.base import Updates
from r2f_ext.decoders.context import Context
from r2f_ext.decoders.learned import Learned
from r2f_ext.errors import R2FError
from r2f_ext.ops import perceptrons

SIZE, HIDDEN = 48, 256
INPUTS = ("b", "ba")


class MLP(Learned):
    """A perceptron per layer: from its update and the `Context` to the core of its gradient (`Core`)."""

    kind = "mlp"
    size = SIZE
    learning_rate = 1e-3
    most_epochs = 20

    def __init__(self, loss: str = "cosine_norm", epochs: int | None = None, seed: int = 0, inputs: str = "b") -> None:
        """Set the training options and the form of the input.

        Args:
            inputs: "b": B. "ba": the product BA, given as B (A A^T)^(1/2), which has the same inner products. From
                B_0 = 0 one step does not change A, so both forms hold the same information.

        Raises:
            R2FError: unknown loss or inputs, or fewer than one epoch.
        """
        super().__init__(loss, epochs, seed)
        if inputs not in INPUTS:
            raise R2FError(f"unknown inputs '{inputs}': choose {' or '.join(INPUTS)}.")
        self.form = inputs

    def prepare(self) -> None:
        self.roots = {name: _root(a.float()) for name, a in self.pairs.a.items()} if self.form == "ba" else {}
        self.context = Context(self.pairs, self.seed)

    def network(self, name: str, shape: torch.Size) -> nn.Module:
        width = self.context.widths[name] + self.context.size
        return nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, shape.numel()))

    def predict(self, inputs: Updates, precision: torch.dtype = torch.float32) -> Updates:
        linear = [m for name in inputs for m in self.networks[name].modules() if isinstance(m, nn.Linear)]
        weights, biases = [m.weight.to(precision) for m in linear], [m.bias.to(precision) for m in linear]
        cores = perceptrons([z.to(precision) for z in inputs.values()], weights, biases)
        return {name: core.float() for name, core in zip(inputs, cores, strict=True)}

    def read(self, units: Updates) -> Updates:
        """The layer's own update, scaled to a mean square of 1 per entry, followed by the context."""
        if self.form == "ba":
            units = {name: unit @ self.roots[name] for name, unit in units.items()}
        context = self.context(units)
        own = {name: units[name].flatten(1) for name in self.pairs.target.names}
        return {name: torch.cat([flat * flat.shape[1] ** 0.5, context], dim=1) for name, flat in own.items()}


def _root(a: Tensor) -> Tensor:
    """(A A^T)^(1/2) [r, r] of A [r, d_in]: |B A| = |B (A A^T)^(1/2)|."""
    values, vectors = torch.linalg.eigh((a @ a.mT).double())
    return ((vectors * values.clamp_min(0).sqrt()) @ vectors.mT).float()

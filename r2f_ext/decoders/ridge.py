"""Closed-form linear map from the updates to a layer's whole gradient, in dual form; the default decoder.

A layer's decoder reads its own update u_l and those of all layers: one sample shaped all of them, so they help each
other (docs/decoders.md has the ablation). With unit updates z = u / |u| the kernel of layer l is
    k_l = own * <z_l, z_l'> + (1 - own) * mean_m <z_m, z_m'>
and ridge regression of G_p / |u_p| predicts
    w = (K_l + lam I)^-1 k_l(u),   G_hat = |u| * sum_p w_p D_p^T X_p / |u_p|
(METHODS 1). The map itself is never formed, and neither are the gradients of all pairs: `decode` walks through the
pairs once more and adds them up, so memory grows with the number of updates only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2f_ext.decoders.base import Decoder, Updates
from r2f_ext.linalg import gram, sum_in_place
from r2f_ext.pairs import PairSource
from r2f_ext.types import Gradient, PairBatch

RIDGE = 5e-3  # lambda, for a kernel with unit diagonal
OWN = 0.5  # weight of the layer's own update in its kernel


class Ridge(Decoder):
    kind = "ridge"

    def __init__(self, ridge: float = RIDGE, own: float = OWN) -> None:
        """ridge: lambda. own: share of the layer's own update in its kernel, 0 to 1."""
        self.ridge, self.own = ridge, own

    def start(self, pairs: PairSource, count: int) -> None:
        self.pairs = pairs
        self.collected: dict[str, list[Tensor]] = {}  # of every layer that the pairs have updates of

    def observe(self, batch: PairBatch) -> None:
        for name, update in batch.updates.items():
            self.collected.setdefault(name, []).append(update.flatten(1))

    def finish(self) -> None:
        self.fit_updates({name: torch.cat(parts) for name, parts in self.collected.items()}, self.pairs)
        self.collected.clear()

    def fit_updates(self, updates: dict[str, Tensor], pairs: PairSource) -> None:
        """Fit to updates [count, d_out * r] already collected; `pairs` must yield the same pairs in this order."""
        self.pairs = pairs
        self.norms = {name: u.norm(dim=1).clamp_min(1e-30) for name, u in updates.items()}
        self.units = {name: u / self.norms[name][:, None] for name, u in updates.items()}
        self.factors = {}
        for name, kernel in _mix({name: gram(unit) for name, unit in self.units.items()}, self.own).items():
            if name not in pairs.target.names:
                continue
            # float32 is enough: lambda keeps the smallest eigenvalues well above its rounding.
            kernel.diagonal().add_(self.ridge)
            self.factors[name] = torch.linalg.cholesky(kernel)

    def weights(self, updates: Updates) -> dict[str, Tensor]:
        """name -> dual weights w [V, count] of updates [V, d_out, r]: G_hat_v = sum_p w[v, p] G_p."""
        flat = {name: update.flatten(1) for name, update in updates.items()}
        norms = {name: u.norm(dim=1, keepdim=True).clamp_min(1e-30) for name, u in flat.items()}
        kernels = _mix({name: (u / norms[name]) @ self.units[name].mT for name, u in flat.items()}, self.own)
        weights = {}
        for name, factor in self.factors.items():
            dual = torch.cholesky_solve(kernels[name].mT, factor).mT
            weights[name] = dual * norms[name] / self.norms[name]
        return weights

    def decode(self, updates: Updates) -> Gradient:
        weights = self.weights(updates)
        count = len(next(iter(self.norms.values())))
        total = {
            layer.name: torch.zeros(
                len(updates[layer.name]), layer.d_out * layer.d_in, device=weights[layer.name].device
            )
            for layer in self.pairs.target.layers
        }
        first = 0
        for batch in self.pairs.batches(0, count):
            last = first + len(batch.labels)
            for name, gradient in total.items():
                gradient.addmm_(weights[name][:, first:last], batch.gradients.dense(name).flatten(1))
            first = last
        return Gradient(
            {
                layer.name: total[layer.name].unflatten(1, (layer.d_out, layer.d_in))
                for layer in self.pairs.target.layers
            }
        )

    def state(self) -> dict[str, Tensor]:
        scaled = {name: self.units[name] * self.norms[name][:, None] for name in self.units}
        return {**scaled, "ridge_and_own": torch.tensor([self.ridge, self.own], dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor], pairs: PairSource) -> None:
        self.ridge, self.own = state["ridge_and_own"].tolist()
        self.fit_updates({name: tensor for name, tensor in state.items() if name != "ridge_and_own"}, pairs)


def _mix(kernels: dict[str, Tensor], own: float) -> dict[str, Tensor]:
    """Each layer's own kernel [n, count] -> that layer's k_l, in place."""
    first, *others = kernels.values()
    shared = sum_in_place([first.clone(), *others]).mul_((1 - own) / len(kernels))
    return {name: kernel.mul_(own).add_(shared) for name, kernel in kernels.items()}

"""Streaming kernel ridge: Nystrom features and normal equations, with memory independent of the number of pairs.

The kernel is that of `kernel.py`. The first m pairs are landmarks; with their kernel matrix K_m = L L^T, the features
are (Williams and Seeger 2001)
    phi(u) = (sqrt(own / 2) z_l, L^-1 k_m(u))        [d_out r + m]
They include the layer's own unit update z_l, because m landmarks do not span it. Ridge regression in these features
needs only sum_p phi_p phi_p^T. As in `ridge`, decoding is a weighted sum over the pairs:
    w_p = phi_p^T (sum phi phi^T + lam I)^-1 phi(u),   G_hat = |u| * sum_p w_p G_p / |u_p|.
lambda is chosen per layer on the last pairs, which are added to the normal equations afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from r2f_ext.decoders.base import Decoder, Updates, add_up, unit_updates
from r2f_ext.decoders.kernel import OWN, kernels
from r2f_ext.decoders.sketch import Sketch, mean_cosine
from r2f_ext.kernel_solver import RidgeSystem, best_ridge
from r2f_ext.linalg import gram
from r2f_ext.pairs import PairSource
from r2f_ext.types import Gradient, PairBatch

LANDMARKS = 1500
JITTER = 1e-5  # added to the diagonal of the landmarks' kernel matrix, which is 1
RIDGES = (3e-4, 1e-3, 3e-3, 1e-2)
HELD_OUT = 400  # pairs to choose lambda on, at most a sixth of all


class KernelRidge(Decoder):
    """Kernel ridge regression in Nystrom features (Williams and Seeger 2001), with the kernel of `kernel.py`."""

    kind = "kernel_ridge"

    def __init__(self, landmarks: int = LANDMARKS) -> None:
        """landmarks: m; limited to half of the pairs."""
        self.wanted_landmarks = landmarks

    def start(self, pairs: PairSource, count: int) -> None:
        self.pairs, self.count = pairs, count
        self.sketch = Sketch(pairs.target)
        self.missing = max(1, min(self.wanted_landmarks, count // 2))
        self.fitted = count - min(HELD_OUT, count // 6)
        self.seen = 0
        self.waiting: list[tuple[Updates, Updates]] = []  # (updates, sketches) seen before the landmarks are complete
        self.normal: dict[str, Tensor] = {}
        self.right: dict[str, Tensor] = {}
        self.held_out: list[tuple[Updates, Updates]] = []  # (features, sketches)

    def observe(self, batch: PairBatch) -> None:
        updates, sketches = {n: u.flatten(1) for n, u in batch.updates.items()}, self.sketch(batch.gradients)
        if self.missing <= 0:
            self._add(updates, sketches)
            return
        self.waiting.append((updates, sketches))
        self.missing -= len(batch.labels)
        if self.missing <= 0:
            self._set_landmarks()
            for each in self.waiting:
                self._add(*each)
            self.waiting.clear()

    def _set_landmarks(self) -> None:
        count = sum(len(next(iter(updates.values()))) for updates, _ in self.waiting) + min(self.missing, 0)
        collected = {n: torch.cat([updates[n] for updates, _ in self.waiting])[:count] for n in self.waiting[0][0]}
        self._take(unit_updates(collected)[0])

    def _take(self, landmarks: Updates) -> None:
        """Store the unit landmarks [m, d_out * r] of every layer, and compute L for the target's layers."""
        self.landmarks = landmarks
        products = {name: gram(z) for name, z in landmarks.items()}
        self.lower = {name: RidgeSystem.of(kernel, JITTER).factor for name, kernel in self._kernels(products)}

    def _kernels(self, products: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        return kernels(products, self.pairs.target.names, lambda name: OWN)

    def _features(self, updates: Updates) -> tuple[Updates, Updates]:
        """name -> phi [n, d_out * r + m] for the target's layers, and name -> norms [n], of updates [n, ...]."""
        units, norms = unit_updates({name: update.flatten(1) for name, update in updates.items()})
        features = {}
        for name, kernel in self._kernels({name: units[name] @ z.mT for name, z in self.landmarks.items()}):
            nystrom = torch.linalg.solve_triangular(self.lower[name], kernel.mT, upper=False).mT
            features[name] = torch.cat([units[name] * (OWN / 2) ** 0.5, nystrom], dim=1)
        return features, norms

    def _add(self, updates: Updates, sketches: Updates) -> None:
        """Add pairs to the normal equations, or store them to choose lambda on."""
        features, norms = self._features(updates)
        sketches = {n: s / norms[n][:, None] for n, s in sketches.items()}
        cut = max(self.fitted - self.seen, 0)
        self.seen += len(next(iter(updates.values())))
        self._accumulate({n: f[:cut] for n, f in features.items()})
        for name, feature in features.items():
            right = feature[:cut].mT @ sketches[name][:cut]
            self.right[name] = right if name not in self.right else self.right[name].add_(right)
        if self.seen > self.fitted:
            self.held_out.append(({n: f[cut:] for n, f in features.items()}, {n: s[cut:] for n, s in sketches.items()}))

    def _accumulate(self, features: Updates) -> None:
        for name, feature in features.items():
            square = feature.mT @ feature
            if name not in self.normal:
                self.normal[name] = torch.zeros_like(square, dtype=torch.float64)
            self.normal[name].add_(square)

    def finish(self) -> None:
        features = {n: torch.cat([f[n] for f, _ in self.held_out]) for n in self.normal}
        wanted = {n: torch.cat([s[n] for _, s in self.held_out]) for n in self.normal}
        self.held_out.clear()
        ridges = {name: self._choose(name, features[name], wanted[name]) for name in self.normal}
        self.right.clear()
        self._accumulate(features)
        self.systems = {name: RidgeSystem.of(self.normal.pop(name), ridges[name]) for name in list(self.normal)}

    def _choose(self, name: str, features: Tensor, wanted: Tensor) -> float:
        """The lambda that predicts the held-out sketches best."""
        if len(features) < 5:
            return RIDGES[-1]
        return best_ridge(self.normal[name], self.right[name].double(), (features, wanted), RIDGES, mean_cosine)[0]

    def decode(self, updates: Updates) -> Gradient:
        features, norms = self._features(updates)
        duals = {
            name: self.systems[name].solve(feature.mT.double()).to(feature.dtype).mT * norms[name][:, None]
            for name, feature in features.items()
        }

        def weights(batch: PairBatch, rows: slice) -> dict[str, Tensor]:
            fitted, fitted_norms = self._features(batch.updates)
            return {name: duals[name] @ feature.mT / fitted_norms[name] for name, feature in fitted.items()}

        return add_up(self.pairs, self.count, weights)

    def state(self) -> dict[str, Tensor]:
        landmarks = {f"landmarks/{name}": z for name, z in self.landmarks.items()}
        factors = {f"factor/{name}": system.factor for name, system in self.systems.items()}
        return {**landmarks, **factors, "count": torch.tensor(self.count)}

    def load_state(self, state: dict[str, Tensor], pairs: PairSource) -> None:
        self.pairs, self.count = pairs, int(state["count"])
        self._take({name: state[f"landmarks/{name}"] for name in pairs.a if f"landmarks/{name}" in state})
        self.systems = {name: RidgeSystem(state[f"factor/{name}"]) for name in pairs.target.names}

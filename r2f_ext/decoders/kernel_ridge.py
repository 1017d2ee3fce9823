"""Kernel ridge on a stream: Nystrom's landmarks and normal equations, memory flat in the number of pairs.

The kernel is that of `ridge`, half linear, half Gaussian. The first m pairs are landmarks: with K_m = L L^T their
kernel matrix, the features are
    phi(u) = (sqrt(own / 2) z_l, L^-1 k_m(u))        [d_out r + m]
(Williams and Seeger 2001); the layer's own unit update comes whole beside them, since m landmarks cannot span it. Ridge
regression in these features needs sum_p phi_p phi_p^T alone, and decodes as `ridge` does, by weights of the pairs:
    w_p = phi_p^T (sum phi phi^T + lam I)^-1 phi(u),   G_hat = |u| * sum_p w_p G_p / |u_p|.
lambda is chosen layer by layer on the last pairs, which join the normal equations afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2f_ext.decoders.base import Decoder, Updates, add_up
from r2f_ext.decoders.ridge import OWN, half_gaussian_, mixed_rest
from r2f_ext.decoders.sketch import Sketch, mean_cosine
from r2f_ext.linalg import gram
from r2f_ext.pairs import PairSource
from r2f_ext.types import Gradient, PairBatch

LANDMARKS = 1500
JITTER = 1e-5  # on the landmarks' kernel, whose diagonal is 1
RIDGES = (3e-4, 1e-3, 3e-3, 1e-2)
HELD_OUT = 400  # at most a sixth


class KernelRidge(Decoder):
    kind = "kernel_ridge"

    def __init__(self, landmarks: int = LANDMARKS) -> None:
        """landmarks: m, at most half of the pairs."""
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
        if self.missing > 0:
            self.waiting.append((updates, sketches))
            self.missing -= len(batch.labels)
            if self.missing <= 0:
                self._set_landmarks()
                for each in self.waiting:
                    self._add(*each)
                self.waiting.clear()
        else:
            self._add(updates, sketches)

    def _set_landmarks(self) -> None:
        count = sum(len(next(iter(updates.values()))) for updates, _ in self.waiting) + min(self.missing, 0)
        collected = {n: torch.cat([updates[n] for updates, _ in self.waiting])[:count] for n in self.waiting[0][0]}
        self._take({name: _unit(u) for name, u in collected.items()})

    def _take(self, landmarks: Updates) -> None:
        """Unit landmarks [m, d_out * r] of every layer, and L of the target's."""
        self.landmarks = landmarks
        grams = {name: gram(z) for name, z in landmarks.items()}
        self.lower = {}
        for name, rest in mixed_rest(list(grams), grams.__getitem__, self.pairs.target.names):
            kernel = half_gaussian_(grams[name] * OWN + rest * (1 - OWN))
            kernel.diagonal().add_(JITTER)
            self.lower[name] = torch.linalg.cholesky(kernel)

    def _features(self, updates: Updates) -> Updates:
        """phi of updates [n, d_out * r] of every layer: [n, d_out * r + m] for the target's."""
        units = {name: _unit(u) for name, u in updates.items()}
        own = {name: units[name] @ z.mT for name, z in self.landmarks.items()}
        features = {}
        for name, rest in mixed_rest(list(own), own.__getitem__, self.pairs.target.names):
            kernel = half_gaussian_(own[name] * OWN + rest * (1 - OWN))
            nystrom = torch.linalg.solve_triangular(self.lower[name], kernel.mT, upper=False).mT
            features[name] = torch.cat([units[name] * (OWN / 2) ** 0.5, nystrom], dim=1)
        return features

    def _add(self, updates: Updates, sketches: Updates) -> None:
        """Take pairs into the normal equations, or keep them for the choice of lambda."""
        features = self._features(updates)
        sketches = {n: s / updates[n].norm(dim=1).clamp_min(1e-30)[:, None] for n, s in sketches.items()}
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
        self._accumulate(features)
        self.factors = {}
        for name in list(self.normal):
            damped = self.normal.pop(name)
            damped.diagonal().add_(ridges[name])
            self.factors[name] = torch.linalg.cholesky(damped)
        self.right.clear()

    def _choose(self, name: str, features: Tensor, wanted: Tensor) -> float:
        """The lambda that predicts the held-out sketches best."""
        if len(features) < 5:
            return RIDGES[-1]
        scores = {}
        for ridge in RIDGES:
            damped = self.normal[name].clone()
            damped.diagonal().add_(ridge)
            solution = torch.cholesky_solve(self.right[name].double(), torch.linalg.cholesky(damped))
            scores[ridge] = mean_cosine(features @ solution.to(features.dtype), wanted)
        return max(scores, key=scores.__getitem__)

    def decode(self, updates: Updates) -> Gradient:
        flat = {name: u.flatten(1) for name, u in updates.items()}
        duals = {}
        for name, feature in self._features(flat).items():
            dual = torch.cholesky_solve(feature.mT.double(), self.factors[name]).to(feature.dtype).mT
            duals[name] = dual * flat[name].norm(dim=1, keepdim=True)

        def weights(batch: PairBatch, rows: slice) -> dict[str, Tensor]:
            seen = {name: u.flatten(1) for name, u in batch.updates.items()}
            norms = {name: u.norm(dim=1).clamp_min(1e-30) for name, u in seen.items()}
            return {name: duals[name] @ feature.mT / norms[name] for name, feature in self._features(seen).items()}

        return add_up(self.pairs, self.count, weights)

    def state(self) -> dict[str, Tensor]:
        landmarks = {f"landmarks/{name}": z for name, z in self.landmarks.items()}
        factors = {f"factor/{name}": factor for name, factor in self.factors.items()}
        return {**landmarks, **factors, "count": torch.tensor(self.count)}

    def load_state(self, state: dict[str, Tensor], pairs: PairSource) -> None:
        self.pairs, self.count = pairs, int(state["count"])
        self._take({name: state[f"landmarks/{name}"] for name in pairs.a if f"landmarks/{name}" in state})
        self.factors = {name: state[f"factor/{name}"] for name in pairs.target.names}


def _unit(update: Tensor) -> Tensor:
    return update / update.norm(dim=1, keepdim=True).clamp_min(1e-30)

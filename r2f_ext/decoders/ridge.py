"""The default decoder: kernel ridge regression, in dual form, from the updates to a layer's full gradient.

With the kernel k_l of `kernel.py`, ridge regression of G_p / |u_p| predicts (docs/methods.md, section 1)
    w = (K_l + lam I)^-1 k_l(u),   G_hat = |u| * sum_p w_p D_p^T X_p / |u_p|.
The weight `own` of the layer's own update and lam are chosen per layer on held-out pairs. The gradients of all pairs
are never in memory at once: `decode` reads the pairs a second time and accumulates the weighted sum, so that only the
updates and the kernel matrices are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from r2f_ext.decoders.base import Decoder, Updates, add_up, unit_updates
from r2f_ext.decoders.kernel import OWN, half_gaussian_, kernels, mixed, mixed_others
from r2f_ext.decoders.sketch import Sketch, mean_cosine
from r2f_ext.kernel_solver import RidgeSystem, best_ridge
from r2f_ext.linalg import gram, solve_in_place
from r2f_ext.pairs import PairSource
from r2f_ext.pairs.memory import budget
from r2f_ext.types import Gradient, PairBatch

RIDGE = 2e-3  # default lambda, if there are too few pairs to choose it on; the kernel has a unit diagonal
OWNS, RIDGES = (0.2, 0.5, 0.8, 0.9, 0.97), (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
CHOICE_PAIRS = 1500  # pairs to choose the settings on, which hardly depend on the count
SAVED_PAIRS = 6000  # above it unit rows are stored in float16, and a CPU factorises again for every `decode`


class Ridge(Decoder):
    """Kernel ridge regression in dual form (docs/methods.md, section 1) with the kernel of `kernel.py`."""

    kind = "ridge"

    def __init__(self, ridge: float | None = None, own: float | None = None) -> None:
        """ridge: lambda; own: weight of the layer's own update, in [0, 1]. None: chosen on held-out pairs."""
        self.ridge, self.own = ridge, own

    def start(self, pairs: PairSource, count: int) -> None:
        self.pairs, self.count = pairs, count
        self.sketch = Sketch(pairs.target)
        self.collected: dict[str, list[Tensor]] = {}  # of every layer that the pairs have updates of
        self.sketched: dict[str, list[Tensor]] = {name: [] for name in pairs.target.names}
        self.seen = 0

    def observe(self, batch: PairBatch) -> None:
        for name, update in batch.updates.items():
            self.collected.setdefault(name, []).append(update.flatten(1))
        if self.seen < CHOICE_PAIRS and None in (self.ridge, self.own):
            for name, sketch in self.sketch(batch.gradients).items():
                self.sketched[name].append(sketch)
        self.seen += len(batch.labels)

    def finish(self) -> None:
        self._take({name: torch.cat(self.collected.pop(name)) for name in list(self.collected)})
        self.settings = self._choose({name: torch.cat(parts) for name, parts in self.sketched.items() if parts})
        self.sketched.clear()
        self._factorise()

    def _take(self, updates: dict[str, Tensor]) -> None:
        """Store norms and unit rows of updates [count, d_out * r]; above SAVED_PAIRS rows are stored in float16.

        Rounding a unit row to float16 changes it by 3e-4 of its length, far below sqrt(lambda).
        """
        self.units, self.norms = {}, {}
        for name in list(updates):
            (unit,), (self.norms[name],) = (each.values() for each in unit_updates({name: updates.pop(name)}))
            self.units[name] = unit.half() if len(unit) > SAVED_PAIRS else unit

    def _choose(self, sketched: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """name -> the (own, lambda) with the best cosine on the last sixth of the first CHOICE_PAIRS pairs."""
        default = OWN if self.own is None else self.own, RIDGE if self.ridge is None else self.ridge
        count = min(CHOICE_PAIRS, self.count)
        held_out = count // 6
        if held_out < 5 or not sketched:
            return dict.fromkeys(self.pairs.target.names, default)
        fit, rest = slice(0, count - held_out), slice(count - held_out, count)
        products = {name: gram(_plain(unit[:count])) for name, unit in self.units.items()}
        chosen = {}
        for name, others in mixed_others(list(products), products.__getitem__, self.pairs.target.names):
            wanted = sketched[name][:count] / self.norms[name][:count, None]
            chosen[name], best = default, float("-inf")
            for own in OWNS if self.own is None else (self.own,):
                kernel = half_gaussian_(mixed(products[name], others, own))
                ridge, score = best_ridge(
                    kernel[fit, fit],
                    wanted[fit],
                    (kernel[rest, fit], wanted[rest]),
                    RIDGES if self.ridge is None else (self.ridge,),
                    mean_cosine,
                )
                if score > best:
                    chosen[name], best = (own, ridge), score
        return chosen

    def _factorise(self) -> None:
        # float32 suffices: lambda keeps the smallest eigenvalues well above the rounding errors.
        self.systems: dict[str, RidgeSystem] = {}
        self.saved = _saves(self.count, len(self.units), self.pairs.target.base.device)
        if self.saved:
            self.systems = {name: RidgeSystem.of(kernel, self.settings[name][1]) for name, kernel in self._kernels()}

    def _kernels(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, K_l [count, count]) for the layers of the target."""
        products: dict[str, Tensor] = {}
        if self.saved:
            products = {name: self._gram(name) for name in self.units}
        # If no factors are saved, products are recomputed (three times as many), so that only three matrices exist at a
        # time.
        of_layer: Callable[[str], Tensor] = products.__getitem__ if products else self._gram
        for name, others in mixed_others(list(self.units), of_layer, self.pairs.target.names):
            own = self.settings[name][0]
            kernel = half_gaussian_(of_layer(name).mul_(own).add_(others, alpha=1 - own))
            products.pop(name, None)  # not used again
            yield name, kernel
            del kernel  # frees it before the next one is allocated

    def _gram(self, name: str) -> Tensor:
        return gram(_plain(self.units[name]))

    def weights(self, updates: Updates) -> dict[str, Tensor]:
        """name -> dual weights w [V, count] of updates [V, d_out, r]: G_hat_v = sum_p w[v, p] G_p."""
        units, norms = unit_updates({name: update.flatten(1) for name, update in updates.items()})
        products = {name: units[name] @ _plain(unit).mT for name, unit in self.units.items()}
        asked = dict(kernels(products, self.pairs.target.names, lambda name: self.settings[name][0]))
        return {name: dual.mT * norms[name][:, None] / self.norms[name] for name, dual in self._duals(asked)}

    def _duals(self, asked: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, (K_l + lam I)^-1 k_l [count, V]) from the kernels k_l [V, count] of the updates to decode."""
        if self.systems:
            for name, kernel in asked.items():
                yield name, self.systems[name].solve(kernel.mT)
            return
        for name, matrix in self._kernels():
            matrix.diagonal().add_(self.settings[name][1])
            dual = solve_in_place(matrix, asked[name].mT)
            del matrix
            yield name, dual

    def decode(self, updates: Updates) -> Gradient:
        weights = self.weights(updates)
        return add_up(self.pairs, self.count, lambda batch, rows: {name: w[:, rows] for name, w in weights.items()})

    def state(self) -> dict[str, Tensor]:
        """Unit updates and norms of every layer; own and lambda of the target's layers."""
        units = {f"unit/{name}": unit for name, unit in self.units.items()}
        norms = {f"norm/{name}": norm for name, norm in self.norms.items()}
        settings = {f"settings/{n}": torch.tensor(pair, dtype=torch.float64) for n, pair in self.settings.items()}
        return {**units, **norms, **settings}

    def load_state(self, state: dict[str, Tensor], pairs: PairSource) -> None:
        self.pairs = pairs
        names = [name for name in pairs.a if f"unit/{name}" in state]  # of all layers, in the order of the fit
        self.units = {name: state[f"unit/{name}"] for name in names}
        self.norms = {name: state[f"norm/{name}"] for name in names}
        self.count = len(self.norms[names[0]])
        chosen = {name: state[f"settings/{name}"].tolist() for name in pairs.target.names}
        self.settings = {name: (own, ridge) for name, (own, ridge) in chosen.items()}
        self._factorise()


def _saves(count: int, layers: int, device: torch.device) -> bool:
    """Whether the factors of the kernels of all layers stay in memory after the fit to `count` pairs."""
    if count <= SAVED_PAIRS or device.type != "cuda":
        return count <= SAVED_PAIRS
    # + 4: the matrices needed to compute one factor. Total memory decides: with free memory, other work on the GPU
    # would change the rounding.
    return 4 * count**2 * (layers + 4) <= budget(device)


def _plain(unit: Tensor) -> Tensor:
    return unit.float() if unit.dtype == torch.float16 else unit

"""Closed-form map from the updates to a layer's whole gradient, by kernel ridge in dual form; the default decoder.

A layer's decoder reads its own update, those of its block and those of all layers: one sample shaped all of them, so
they help each other (docs/pairs-and-decoders.md). With unit updates z = u / |u| the kernel of layer l is
    k_l = (c_l + exp(2 gamma (c_l - 1))) / 2
    c_l = own <z_l, z_l'> + (1 - own) / 2 (mean over the block of <z_m, z_m'> + mean over all layers of <z_m, z_m'>)
half linear, half Gaussian, and ridge regression of G_p / |u_p| predicts
    w = (K_l + lam I)^-1 k_l(u),   G_hat = |u| * sum_p w_p D_p^T X_p / |u_p|
(METHODS 1). `own` and lam are chosen layer by layer on pairs held out from the first ones. The map itself is never
formed, and neither are the gradients of all pairs: `decode` walks through the pairs once more and adds them up, so
memory grows with the number of updates only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from r2f_ext.decoders.base import Decoder, Updates, add_up
from r2f_ext.decoders.sketch import Sketch, mean_cosine
from r2f_ext.linalg import gram, solve_in_place
from r2f_ext.pairs import PairSource
from r2f_ext.types import Gradient, PairBatch

GAMMA = 0.25
OWN, RIDGE = 0.9, 2e-3  # where there are too few pairs to choose by; lambda is for a kernel of unit diagonal
OWNS, RIDGES = (0.2, 0.5, 0.8, 0.9, 0.97), (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
CHOICE_PAIRS = 1500  # the settings are chosen on a part: they hardly depend on the count
KEPT_PAIRS = 6000  # above, Cholesky factors are not kept (4 n^2 bytes a layer) but made anew by every `decode`


class Ridge(Decoder):
    kind = "ridge"

    def __init__(self, ridge: float | None = None, own: float | None = None) -> None:
        """ridge: lambda; own: share of the layer's own update in its kernel, 0 to 1. None: chosen on held-out pairs."""
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
        """Norms and unit rows of updates [count, d_out * r]; many of them are held in half precision.

        Rounding a unit row to float16 moves it by 3e-4 of its length, far below sqrt(lambda).
        """
        self.norms = {name: u.norm(dim=1).clamp_min(1e-30) for name, u in updates.items()}
        self.units = {}
        for name in list(updates):
            unit = updates.pop(name) / self.norms[name][:, None]
            self.units[name] = unit.half() if len(unit) > KEPT_PAIRS else unit

    def _choose(self, sketched: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """name -> (own, lambda) that decode the last sixth of the first CHOICE_PAIRS pairs best from the rest."""
        default = OWN if self.own is None else self.own, RIDGE if self.ridge is None else self.ridge
        held_out = min(CHOICE_PAIRS, self.count) // 6
        if held_out < 5 or not sketched:
            return dict.fromkeys(self.pairs.target.names, default)
        fitted = min(CHOICE_PAIRS, self.count) - held_out
        grams = {name: gram(_plain(unit[: fitted + held_out])) for name, unit in self.units.items()}
        chosen = {}
        for name, rest in mixed_rest(list(grams), grams.__getitem__, self.pairs.target.names):
            wanted = sketched[name][: fitted + held_out] / self.norms[name][: fitted + held_out, None]
            chosen[name], best = default, -2.0
            for own in OWNS if self.own is None else (self.own,):
                kernel = half_gaussian_(grams[name] * own + rest * (1 - own))
                for ridge in RIDGES if self.ridge is None else (self.ridge,):
                    damped = kernel[:fitted, :fitted].clone()
                    damped.diagonal().add_(ridge)
                    dual = torch.cholesky_solve(wanted[:fitted], torch.linalg.cholesky(damped))
                    score = mean_cosine(kernel[fitted:, :fitted] @ dual, wanted[fitted:])
                    if score > best:
                        chosen[name], best = (own, ridge), score
        return chosen

    def _factorise(self) -> None:
        # float32 is enough: lambda keeps the smallest eigenvalues well above its rounding.
        self.factors: dict[str, Tensor] = {}
        if self.count <= KEPT_PAIRS:
            for name, kernel in self._damped_kernels():
                self.factors[name] = torch.linalg.cholesky(kernel)

    def _damped_kernels(self) -> Iterator[tuple[str, Tensor]]:
        """K_l + lam I [count, count], one layer of the target after another."""
        grams: dict[str, Tensor] = {}
        if self.count <= KEPT_PAIRS:
            grams = {name: self._gram(name) for name in self.units}
        # Otherwise three matrices at a time rather than one a layer, for thrice the products.
        of_layer: Callable[[str], Tensor] = grams.__getitem__ if grams else self._gram
        for name, rest in mixed_rest(list(self.units), of_layer, self.pairs.target.names):
            own, ridge = self.settings[name]
            kernel = half_gaussian_(of_layer(name).mul_(own).add_(rest, alpha=1 - own))
            grams.pop(name, None)  # it is not asked for again
            kernel.diagonal().add_(ridge)
            yield name, kernel
            del kernel  # before the next one is made

    def _gram(self, name: str) -> Tensor:
        return gram(_plain(self.units[name]))

    def weights(self, updates: Updates) -> dict[str, Tensor]:
        """name -> dual weights w [V, count] of updates [V, d_out, r]: G_hat_v = sum_p w[v, p] G_p."""
        flat = {name: update.flatten(1) for name, update in updates.items()}
        norms = {name: u.norm(dim=1, keepdim=True).clamp_min(1e-30) for name, u in flat.items()}
        own_kernels = {name: (flat[name] / norms[name]) @ _plain(unit).mT for name, unit in self.units.items()}
        kernels = {}
        for name, rest in mixed_rest(list(own_kernels), own_kernels.__getitem__, self.pairs.target.names):
            own = self.settings[name][0]
            kernels[name] = half_gaussian_(own_kernels[name] * own + rest * (1 - own))
        weights = {}
        for name, dual in self._duals(kernels):
            weights[name] = dual.mT * norms[name] / self.norms[name]
        return weights

    def _duals(self, kernels: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(K_l + lam I)^-1 k_l [count, V]."""
        if self.factors:
            for name, kernel in kernels.items():
                yield name, torch.cholesky_solve(kernel.mT, self.factors[name])
        else:
            for name, matrix in self._damped_kernels():
                dual = solve_in_place(matrix, kernels[name].mT)
                del matrix
                yield name, dual

    def decode(self, updates: Updates) -> Gradient:
        weights = self.weights(updates)
        return add_up(self.pairs, self.count, lambda batch, rows: {name: w[:, rows] for name, w in weights.items()})

    def state(self) -> dict[str, Tensor]:
        """Unit updates and norms of every layer, own and lambda of the target's."""
        units = {f"unit/{name}": unit for name, unit in self.units.items()}
        norms = {f"norm/{name}": norm for name, norm in self.norms.items()}
        settings = {f"settings/{n}": torch.tensor(pair, dtype=torch.float64) for n, pair in self.settings.items()}
        return {**units, **norms, **settings}

    def load_state(self, state: dict[str, Tensor], pairs: PairSource) -> None:
        self.pairs = pairs
        names = [name for name in pairs.a if f"unit/{name}" in state]  # all layers', in the order of the fit
        self.units = {name: state[f"unit/{name}"] for name in names}
        self.norms = {name: state[f"norm/{name}"] for name in names}
        self.count = len(self.norms[names[0]])
        chosen = {name: state[f"settings/{name}"].tolist() for name in pairs.target.names}
        self.settings = {name: (own, ridge) for name, (own, ridge) in chosen.items()}
        self._factorise()


def block_of(name: str) -> str:
    """The block that a layer belongs to: its module path up to the first number (`blocks.0` of `blocks.0.mlp.fc1`)."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found.group() if found else name


def mixed_rest(
    names: list[str], gram_of: Callable[[str], Tensor], wanted: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """What a layer's kernel has beside its own part: half its block's mean, half that of all layers.

    The means are over `names`, the matrices of `wanted` ones come. One is shared by the layers of a block and is
    overwritten for the next block.
    """
    if not wanted:
        return
    shared = torch.zeros_like(gram_of(names[0]))
    for name in names:
        shared.add_(gram_of(name), alpha=0.5 / len(names))
    rest = torch.empty_like(shared)
    for block in dict.fromkeys(map(block_of, wanted)):
        members = [name for name in names if block_of(name) == block]
        rest.copy_(shared)
        for name in members:
            rest.add_(gram_of(name), alpha=0.5 / len(members))
        for name in members:
            if name in wanted:
                yield name, rest


def half_gaussian_(cosine: Tensor) -> Tensor:
    """(c + exp(2 gamma (c - 1))) / 2 of cosines c [n, m], in place: of unit diagonal where c is."""
    for rows in cosine.split(1000):  # a second matrix of the pairs would be the peak of memory
        rows.add_(torch.exp((rows - 1) * (2 * GAMMA))).div_(2)
    return cosine


def _plain(unit: Tensor) -> Tensor:
    return unit.float() if unit.dtype == torch.float16 else unit

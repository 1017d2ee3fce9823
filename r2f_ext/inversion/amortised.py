"""Amortised inversion (docs/methods.md, 3d): kernel ridge from the LoRA update to the image, fitted on proxy pairs.

The kernel depends only on directions: with c the cosine of two updates averaged over layers,
k = exp(-2 gamma (1 - c)). The victim's unknown learning rate therefore cancels.

The label is estimated first: it decides the sign and direction of the gradient at the logits, so updates of different
labels follow different maps. The image is then estimated from the pairs of that label alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.kernel_solver import RidgeSystem, best_ridge
from r2f_ext.linalg import gram, sum_in_place
from r2f_ext.types import Reconstruction

GAMMAS = (0.25, 0.5, 1.0, 2.0)
RIDGES = (3e-3, 1e-2, 3e-2, 1e-1)
SELECTION_PAIRS = 1000  # gamma and ridge are chosen on these, as they hardly depend on the count
LABEL_PAIRS = 2000  # pairs to estimate labels from; more improve little
MIN_PAIRS = 20
OWN_PAIRS = 100  # minimum pairs of one label to fit it alone; with fewer, the pairs of all labels are used


@dataclass(frozen=True)
class Choice:
    """The kernel width and ridge that did best on held-out proxy pairs, and their PSNR there in dB."""

    gamma: float
    ridge: float
    held_out_psnr_db: float


class ImageRegression:
    """Kernel ridge on N pairs, gamma and ridge chosen by PSNR on held-out ones.

    Args:
        cosine: [N, N] of the updates; overwritten.
        wanted: [N, k], what to predict for each.
        pixels: how many of the k columns are pixels, from the first on; PSNR is computed on these.

    Attributes:
        errors: [n, pixels], leave-one-out errors of a fit to the first n = SELECTION_PAIRS pairs.
        system: K + ridge I of all N pairs.

    Raises:
        R2FError: K + ridge I is not positive definite.
    """

    def __init__(self, cosine: Tensor, wanted: Tensor, pixels: int) -> None:
        self.choice = _select(cosine, wanted, pixels)
        self.errors = _errors(cosine, wanted, self.choice)[:, :pixels]
        self.near_similarity = float(cosine.fill_diagonal_(-1).amax(1).quantile(0.05))
        cosine.fill_diagonal_(1)
        self.mean = wanted.mean(0)
        self.system = system_(cosine, self.choice)
        self.dual = self.system.solve(wanted - self.mean)

    def __call__(self, cosine: Tensor) -> Tensor:
        """Cosines [V, N] of new updates with the fitted ones -> estimate [V, k]."""
        return kernel_(cosine.clone(), self.choice.gamma) @ self.dual + self.mean

    def without(self, cosine: Tensor, left_out: Tensor) -> Tensor:
        """Like a call, but row v of the estimates [V, k] is from a fit without the pair left_out[v], int64 [V].

        With C = (K + ridge I)^-1, the solution w = C y becomes w - C e_i w_i / C_ii without pair i, so that an estimate
        k^T w changes by -(k^T C e_i) w_i / C_ii. The mean and the settings stay those of all pairs.
        """
        kernel = kernel_(cosine.clone(), self.choice.gamma)
        columns = self.system.solve(F.one_hot(left_out, len(self.dual)).to(kernel).mT)
        own = columns[left_out, torch.arange(len(left_out), device=columns.device)]
        share = (kernel * columns.mT).sum(1) / own
        return kernel @ self.dual - share[:, None] * self.dual[left_out] + self.mean


class AmortisedInverter:
    """Kernel ridge from updates to images: one fit per label, made when it is first needed.

    Args:
        updates: name -> proxy updates [N, d_out, r] or flat [N, d_out * r].
        images: [N, c, h, w] in [0, 1], one an update (batch 1).
        labels: [N] int64.
        num_classes: width of the one-hot target that labels are found by.

    Raises:
        R2FError: fewer than 20 pairs.
    """

    def __init__(self, updates: dict[str, Tensor], images: Tensor, labels: Tensor, num_classes: int) -> None:
        if len(images) < MIN_PAIRS:
            raise R2FError(
                f"the amortised route needs at least {MIN_PAIRS} proxy pairs, got {len(images)}: use a larger proxy."
            )
        self.shape = images.shape[1:]
        self.images, self.labels, self.num_classes = images.flatten(1), labels, num_classes
        self.units = {name: unit_rows(update) for name, update in updates.items()}
        self.fits: dict[int | None, ImageRegression] = {}
        self.labeller: ImageRegression | None = None

    @property
    def choice(self) -> Choice:
        """The settings of the fit to the pairs of all labels."""
        return self._fit(None).choice

    def find_labels(self, updates: dict[str, Tensor], known: Tensor | None = None) -> Tensor:
        """Labels [V] of V victims, by kernel ridge on up to LABEL_PAIRS pairs; `known` [V]: those known, else -1."""
        if known is not None:
            return torch.where(known >= 0, known, self.find_labels(updates)) if bool((known < 0).any()) else known
        victims = len(next(iter(updates.values())))
        if bool((self.labels == self.labels[0]).all()):
            return self.labels[:1].expand(victims).clone()
        rows = slice(0, LABEL_PAIRS)
        if self.labeller is None:
            one_hot = F.one_hot(self.labels[rows], self.num_classes).to(self.images.dtype)
            self.labeller = ImageRegression(self._gram(rows), one_hot, self.num_classes)
        return self.labeller(self._cosine(updates, rows)).argmax(1)

    def invert(self, updates: dict[str, Tensor], known_labels: Tensor | None = None) -> Reconstruction:
        """Updates of V victims [V, d_out, r] a layer -> images and labels; `known_labels`: see `find_labels`."""
        began = time.perf_counter()
        labels = self.find_labels(updates, known_labels)
        images = self.images.new_empty(len(labels), self.images.shape[1])
        pairs = held_out = 0.0
        errors: dict[int, Tensor] = {}
        for label in labels.unique().tolist():
            victims = labels == label
            fit, rows = self._fit(label), self._rows(label)
            images[victims] = fit(self._cosine({name: u[victims] for name, u in updates.items()}, rows))
            share = float(victims.float().mean())
            pairs, held_out = pairs + share * len(fit.dual), held_out + share * fit.choice.held_out_psnr_db
            errors[label] = fit.errors
        why = (
            f"statistical estimate by kernel ridge from {pairs:.0f} proxy pairs per victim (those of its label, where "
            f"there are at least {OWN_PAIRS}); {held_out:.1f} dB on held-out proxies"
        )
        if known_labels is not None:
            why += f"; {int((known_labels >= 0).sum())} of {len(labels)} labels read from a saved head"
        details = {"held_out_psnr_db": held_out, "pairs_a_victim": pairs}
        found = images.clamp(0, 1).unflatten(1, self.shape)
        return Reconstruction("amortised", found, labels, why, time.perf_counter() - began, details, loo_errors=errors)

    def far_from_proxy(self, updates: dict[str, Tensor], known_labels: Tensor | None = None) -> Tensor:
        """Bool [V]: victims whose estimate is unreliable, because their update resembles no proxy update.

        Their largest cosine with a proxy update is below the 5th percentile of each proxy's largest cosine with
        another.
        """
        labels = self.find_labels(updates, known_labels)
        far = torch.zeros_like(labels, dtype=torch.bool)
        for label in labels.unique().tolist():
            victims = labels == label
            nearest = self._cosine({name: u[victims] for name, u in updates.items()}, self._rows(label)).amax(1)
            far[victims] = nearest < self._fit(label).near_similarity
        return far

    def invert_without(self, updates: dict[str, Tensor], label: int, pairs: Tensor) -> Tensor:
        """Images [V, c, h, w] of V updates of one label; the image of update v is from a fit without pair pairs[v].

        This is the estimate for a proxy as if it had been held out.

        Args:
            updates: name -> [V, d_out, r] or flat [V, d_out * r].
            pairs: int64 [V], indices among all pairs; where the label is fitted alone, pairs of that label.
        """
        fit, rows = self._fit(label), self._rows(label)
        places = pairs if isinstance(rows, slice) else torch.searchsorted(rows, pairs)
        return fit.without(self._cosine(updates, rows), places).clamp(0, 1).unflatten(1, self.shape)

    def leave_one_out(self) -> Tensor:
        """The estimate [N, pixels] of every pair from the others of its label: y_i - dual_i / ((K + ridge)^-1)_ii."""
        found = torch.empty_like(self.images)
        for label in self.labels.unique().tolist():
            fit, rows, own = self._fit(label), self._rows(label), self.labels == label
            estimates = self.images[rows] - fit.system.leave_one_out_errors(fit.dual)
            found[own] = estimates[own] if isinstance(rows, slice) else estimates
        return found

    def unit_updates(self, updates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Updates [V, d_out, r] a layer, flat and of norm 1: what the kernel and the U-Net read."""
        return {name: unit_rows(updates[name]) for name in self.units}

    def _rows(self, label: int | None) -> slice | Tensor:
        if label is None:
            return slice(None)
        own = torch.nonzero(self.labels == label).flatten()
        return own if len(own) >= OWN_PAIRS else slice(None)

    def _fit(self, label: int | None) -> ImageRegression:
        """The kernel ridge for a label: of its own pairs, or of all where they are too few."""
        rows = self._rows(label)
        key = None if isinstance(rows, slice) else label
        if key not in self.fits:
            self.fits[key] = ImageRegression(self._gram(rows), self.images[rows], self.images.shape[1])
        return self.fits[key]

    def _gram(self, rows: slice | Tensor) -> Tensor:
        """Cosine [n, n] of the proxies' updates `rows` with one another, averaged over layers."""
        return sum_in_place(gram(unit[rows]) for unit in self.units.values()).div_(len(self.units))

    def _cosine(self, updates: dict[str, Tensor], rows: slice | Tensor) -> Tensor:
        """Cosine [V, n] of updates with the proxies' `rows`, averaged over layers."""
        parts = (unit_rows(updates[name]) @ unit[rows].mT for name, unit in self.units.items())
        return sum_in_place(parts).div_(len(self.units))


def unit_rows(update: Tensor) -> Tensor:
    """Updates [n, ...] flat and of norm 1, [n, k]; zero ones stay zero."""
    return F.normalize(update.flatten(1), dim=1, eps=1e-30)


def kernel_(cosine: Tensor, gamma: float) -> Tensor:
    """exp(-2 gamma (1 - cosine)), in place."""
    return cosine.sub_(1).mul_(2 * gamma).exp_()


def system_(cosine: Tensor, choice: Choice) -> RidgeSystem:
    """K + ridge I; cosine [n, n] is overwritten."""
    return RidgeSystem.of(kernel_(cosine, choice.gamma), choice.ridge)


def _errors(cosine: Tensor, wanted: Tensor, choice: Choice) -> Tensor:
    """Leave-one-out errors [n, k] of a fit to the first SELECTION_PAIRS pairs."""
    count = min(SELECTION_PAIRS, len(cosine))
    system = system_(cosine[:count, :count].clone(), choice)
    return system.leave_one_out_errors(system.solve(wanted[:count] - wanted[:count].mean(0)))


def _select(cosine: Tensor, wanted: Tensor, pixels: int) -> Choice:
    """Choose gamma and ridge by PSNR on the last sixth of the first SELECTION_PAIRS pairs."""
    count = min(SELECTION_PAIRS, len(cosine))
    train = count - count // 6
    centred = wanted[:count] - wanted[:train].mean(0)

    def psnr(predicted: Tensor, true: Tensor) -> float:
        error = (predicted - true)[:, :pixels].square().mean(1)
        return float(-10 * torch.log10(error.clamp_min(1e-10)).mean())

    best = Choice(GAMMAS[0], RIDGES[-1], float("-inf"))
    for gamma in GAMMAS:
        kernel = kernel_(cosine[:count, :count].clone(), gamma)
        held_out = kernel[train:, :train], centred[train:]
        choice = Choice(gamma, *best_ridge(kernel[:train, :train], centred[:train], held_out, RIDGES, psnr))
        best = max(best, choice, key=lambda each: each.held_out_psnr_db)
    return best

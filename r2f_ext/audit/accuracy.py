"""How accurate decoders are: on held-out proxies, beside what needs no decoder, and on the victims themselves.

A cosine on held-out proxies holds for images like the proxies. Beside it stand the mean gradient of the label's proxies
(it reads the label and nothing of the update), the projection (no training), an estimate for the victims from how far
their updates lie from the fitted ones, and, where the private images are known, the true cosine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.decoders import Decoder, Updates, held_out_cosines, with_saved
from r2f_ext.decoders.base import MatrixDecoder
from r2f_ext.linalg import sum_in_place
from r2f_ext.pairs import PairSource
from r2f_ext.types import Gradient, Target

FLOOR = "projection"  # the decoder without training
CLASS_PAIRS = 1000  # fitted pairs that class means are taken of
CLASSES = 10  # class means in memory: of the labels that are most frequent among the held-out pairs
UNLIKE, UNLIKE_QUANTILE = 0.25, 0.05  # see `estimated_cosine`
LEAST_OF_CLASS = 20  # a mean of fewer gradients says little

Figures = dict[str, dict[str, dict[str, float | None]]]  # layer -> decoder -> name -> value


@dataclass(frozen=True)
class Scored:
    """Decoders' figures, and what they decode.

    Attributes:
        figures: layer -> kind -> {cosine_mean, cosine_p05, norm_error} on held-out pairs; class_mean_cosine and
            floor_cosine, the same for every kind; victim_estimate, the mean over victims. None: not known.
        decoded: the victims' gradients by the last decoder, [V, d_out, d_in] a layer; exact where the update is one.
        matrices: kind -> layer -> [r, d_in], of the decoders that multiply updates by a matrix.
    """

    figures: Figures
    decoded: Gradient
    matrices: dict[str, dict[str, Tensor]]


def score_and_decode(
    pairs: PairSource,
    decoders: list[Decoder],
    updates: dict[str, Tensor],
    labels: Tensor,
    observed: Updates,
    fitted: int,
    held_out: int,
) -> Scored:
    """Score every decoder on the `held_out` pairs after the fitted ones, and decode the victims.

    Args:
        updates: name -> [count, d_out * r], of all pairs; labels: [count].
        observed: name -> the victims' updates [V, d_out, r].
    """
    figures: Figures = {name: {} for name in observed}
    matrices: dict[str, dict[str, Tensor]] = {}
    rest = slice(fitted, fitted + held_out)
    both = {name: torch.cat([u, updates[name][rest].view(held_out, *u.shape[1:])]) for name, u in observed.items()}
    victims = len(next(iter(observed.values())))
    near = similarity(both, {name: update[:fitted] for name, update in updates.items()})
    decoded = Gradient({})
    for decoder in decoders:
        gradients = decoder.decode(both).dense
        found = held_out_cosines(
            Gradient({name: g[victims:] for name, g in gradients.items()}), pairs, rest.start, rest.stop
        )
        for name, summary in found.summary().items():
            estimate = estimated_cosine(near[victims:], found.cosine[name], near[:victims])
            figures[name][decoder.kind] = {**summary, "victim_estimate": estimate}
        if isinstance(decoder, MatrixDecoder):
            matrices[decoder.kind] = decoder.matrices
        decoded = Gradient({name: g[:victims].clone() for name, g in gradients.items()})
        del gradients
    means = class_mean_cosines(pairs, labels, fitted, held_out)
    for name, kinds in figures.items():
        floor = kinds[FLOOR]["cosine_mean"] if FLOOR in kinds else None
        for each in kinds.values():
            each |= {"class_mean_cosine": means.get(name), "floor_cosine": floor}
    return Scored(figures, with_saved(pairs.target, observed, decoded), matrices)


def similarity(asked: Updates, fitted: dict[str, Tensor]) -> Tensor:
    """[n] largest cosine of updates with any of the fitted ones, averaged over layers before the maximum is taken."""
    parts = (
        F.normalize(asked[name].flatten(1), dim=1) @ F.normalize(update.flatten(1), dim=1).mT
        for name, update in fitted.items()
    )
    return sum_in_place(parts).div_(len(fitted)).amax(1)


def estimated_cosine(near: Tensor, cosines: Tensor, asked: Tensor) -> float | None:
    """The mean cosine to expect of victims, from a line through held-out pairs; None for victims unlike these.

    The line holds among images like the proxies only: at the same similarity, other images are decoded worse.

    Args:
        near, cosines: [n], the similarity of each held-out pair to the fitted ones and its cosine.
        asked: [V], the victims' similarity; more than UNLIKE of them below UNLIKE_QUANTILE of `near` are unlike.
    """
    x, y = near.double(), cosines.double()
    if float((asked < x.quantile(UNLIKE_QUANTILE)).double().mean()) > UNLIKE:
        return None
    centred = x - x.mean()
    slope = (centred * y).sum() / centred.square().sum().clamp_min(1e-12)
    return float((y.mean() + slope * (asked.double() - x.mean())).clamp(0, 1).mean())


def class_mean_cosines(pairs: PairSource, labels: Tensor, fitted: int, held_out: int) -> dict[str, float]:
    """layer -> mean cosine of held-out gradients with the mean gradient of their label among the fitted pairs.

    What a decoder reaches that reads the label and nothing else. Only the CLASSES most frequent labels of the held-out
    pairs are asked, and of these only those with LEAST_OF_CLASS fitted pairs; without any, the result is empty.
    """
    count = min(fitted, CLASS_PAIRS)
    asked, frequency = labels[fitted : fitted + held_out].unique(return_counts=True)
    frequent = asked[frequency.argsort(descending=True, stable=True)[:CLASSES]].tolist()
    classes = [label for label in frequent if int((labels[:count] == label).sum()) >= LEAST_OF_CLASS]
    if not classes:
        return {}
    sums: dict[str, dict[int, Tensor]] = {name: {} for name in pairs.target.names}
    for batch in pairs.batches(0, count):
        for name, by_label in sums.items():
            x, delta = batch.gradients.x[name], batch.gradients.delta[name]
            for label in classes:
                rows = batch.labels[:, 0] == label
                total = delta[rows].flatten(0, 1).mT @ x[rows].flatten(0, 1)
                by_label[label] = by_label[label].add_(total) if label in by_label else total
    cosines: dict[str, list[Tensor]] = {name: [] for name in sums}
    for batch in pairs.batches(fitted, fitted + held_out):
        for name, by_label in sums.items():
            for label in classes:
                rows = batch.labels[:, 0] == label
                true = batch.gradients.delta[name][rows].mT @ batch.gradients.x[name][rows]
                cosines[name].append(F.cosine_similarity(true.flatten(1), by_label[label].flatten()[None]))
    return {name: float(torch.cat(parts).mean()) for name, parts in cosines.items()}


def true_cosines(
    target: Target, guesses: dict[str, Callable[[str, int], Tensor]], images: Tensor, labels: Tensor
) -> dict[str, dict[str, Tensor]]:
    """layer -> kind -> [n] cosine of the decoded gradient with that of the true image and label, at the start.

    Args:
        guesses: kind -> (layer, victim) -> its decoded gradient [d_out, d_in].
        images: [n, c, h, w]; labels: [n].
    """
    found: dict[str, dict[str, list[Tensor]]] = {name: {kind: [] for kind in guesses} for name in target.names}
    device = target.base.device
    with Capture(target) as capture:
        for victim in range(len(images)):
            row = slice(victim, victim + 1)
            true = capture(images[row, None].to(device), labels[row, None].to(device))
            for name, by_kind in found.items():
                gradient = true.dense(name).flatten()
                for kind, values in by_kind.items():
                    values.append(F.cosine_similarity(guesses[kind](name, victim).flatten(), gradient, dim=0).cpu())
    return {name: {kind: torch.stack(values) for kind, values in kinds.items()} for name, kinds in found.items()}

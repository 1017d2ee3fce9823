"""How accurate decoders are: on held-out proxies, beside what needs no decoder, and on the victims themselves.

A cosine on held-out proxies is valid for images like the proxies. It is reported beside the cosines of the mean
gradient of the label's proxies (which reads only the label) and of the projection (no training), an estimate for the
victims from the distance of their updates to the fitted ones, and, if the private images are known, the true cosine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.decoders import DEFAULT_KINDS, Accuracy, Decoder, Guess, Updates, held_out_cosines_of_each, with_saved
from r2f_ext.decoders.base import MatrixDecoder
from r2f_ext.errors import expected
from r2f_ext.linalg import sum_in_place
from r2f_ext.pairs import PairSource
from r2f_ext.types import Gradient, PairBatch, Target

FLOOR = "projection"  # the decoder without training
DECODED = DEFAULT_KINDS[-1]  # the decoder whose gradients are handed on
CLASS_MEAN = "class mean"
CLASS_PAIRS = 1000  # fitted pairs that class means are taken of
CLASSES = 10  # class means in memory: of the labels that are most frequent among the held-out pairs
UNLIKE, UNLIKE_QUANTILE = 0.25, 0.05  # see `estimated_cosine`
LEAST_OF_CLASS = 20  # a mean of fewer gradients says little

Part = TypeVar("Part")
Result = TypeVar("Result")


@dataclass(frozen=True)
class DecoderFigures(Accuracy):
    """The accuracy of one decoder in one layer, and what it is compared with. None: not known.

    Attributes:
        victim_estimate: the mean cosine to expect of the victims.
        victim_true: their mean cosine, where the private images are known.
        class_mean_cosine, floor_cosine: on held-out pairs, of the class means and of FLOOR; the same for every decoder.
    """

    victim_estimate: float | None = None
    victim_true: float | None = None
    class_mean_cosine: float | None = None
    floor_cosine: float | None = None


Figures = dict[str, dict[str, DecoderFigures]]  # layer -> decoder -> figures


@dataclass(frozen=True)
class Scored:
    """Decoders' figures, and what they decode.

    Attributes:
        figures: layer -> kind -> figures, without `victim_true`.
        decoded: the victims' gradients by the decoder DECODED, [V, d_out, d_in] a layer; exact where the update is one;
            None where that decoder failed.
        matrices: kind -> layer -> [r, d_in], of the decoders that multiply updates by a matrix.
    """

    figures: Figures = field(default_factory=dict)
    decoded: Gradient | None = None
    matrices: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class ClassMeans:
    """The mean gradient of each label's fitted pairs: the output of a decoder that reads only the label.

    Only the CLASSES most frequent labels of the held-out pairs have one, and of these only those with LEAST_OF_CLASS
    pairs among the first CLASS_PAIRS fitted ones.

    Args:
        labels: [count] of all pairs: `fitted` of them, then `held_out`.
    """

    def __init__(self, labels: Tensor, fitted: int, held_out: int) -> None:
        self.left = min(fitted, CLASS_PAIRS)  # pairs still to be summed
        self.asked = labels[fitted : fitted + held_out]
        values, frequency = self.asked.unique(return_counts=True)
        frequent = values[frequency.argsort(descending=True, stable=True)[:CLASSES]].tolist()
        self.classes = [label for label in frequent if int((labels[: self.left] == label).sum()) >= LEAST_OF_CLASS]
        self.sums: dict[str, dict[int, Tensor]] = {}

    def start(self, pairs: PairSource, count: int) -> None:
        self.sums = {name: {} for name in pairs.target.names}

    def observe(self, batch: PairBatch) -> None:
        """Add up the gradients of one batch; batches are passed in the order of the pairs."""
        labels = batch.labels[: self.left, 0]
        self.left -= len(labels)
        for name, by_label in self.sums.items() if len(labels) else ():
            x, delta = batch.gradients.x[name][: len(labels)], batch.gradients.delta[name][: len(labels)]
            for label in self.classes:
                rows = labels == label
                total = delta[rows].flatten(0, 1).mT @ x[rows].flatten(0, 1)
                by_label[label] = by_label[label].add_(total) if label in by_label else total

    def finish(self) -> None:
        """The direction of a sum is that of the mean."""

    def guess(self, name: str, rows: slice) -> Tensor:
        """See `Guess`; zero where the label has no mean."""
        sums = self.sums[name]
        none = torch.zeros_like(next(iter(sums.values())))
        return torch.stack([sums.get(label, none) for label in self.asked[rows].tolist()])

    @property
    def has_mean(self) -> Tensor:
        """Bool [held_out]: whether the label of a held-out pair has a mean."""
        return torch.isin(self.asked, torch.tensor(self.classes, dtype=self.asked.dtype))


Learner = Decoder | ClassMeans


def each(parts: dict[str, Part], failed: dict[str, str], step: Callable[[Part], Result]) -> dict[str, Result]:
    """name -> step(part). A part that fails is taken out of `parts`, and `failed` says why; a bug is raised."""
    results = {}
    for name in list(parts):
        try:
            results[name] = step(parts[name])
        except Exception as error:
            failed[name] = expected(error)
            del parts[name]
    return results


def score_and_decode(
    pairs: PairSource,
    learners: dict[str, Learner],
    updates: dict[str, Tensor],
    observed: Updates,
    held_out: slice,
    failed: dict[str, str],
) -> Scored:
    """Score all decoders in one pass over the held-out pairs, which follow the fitted ones, and decode the victims.

    Args:
        learners: fitted, by kind; those that fail to decode are taken out, and `failed` says why.
        updates: name -> [count, d_out * r], of all pairs.
        observed: name -> the victims' updates [V, d_out, r].
    """
    count, rest = held_out.stop - held_out.start, {name: update[held_out] for name, update in updates.items()}
    both = {name: torch.cat([rest[name].view(count, *u.shape[1:]), u]) for name, u in observed.items()}
    near = similarity(both, {name: update[: held_out.start] for name, update in updates.items()})
    decoders = {kind: one for kind, one in learners.items() if isinstance(one, Decoder)}
    guesses = each(decoders, failed, lambda decoder: _guess(decoder, both))
    means = learners.get(CLASS_MEAN)
    beside = {CLASS_MEAN: means.guess} if isinstance(means, ClassMeans) and means.classes else {}
    found = held_out_cosines_of_each({**guesses, **beside}, pairs, held_out.start, held_out.stop)
    figures: Figures = {name: {} for name in observed}
    for kind in guesses:
        for name, summary in found[kind].summary().items():
            estimate = estimated_cosine(near[:count], found[kind].cosine[name], near[count:])
            figures[name][kind] = DecoderFigures(**asdict(summary), victim_estimate=estimate)
    for name, kinds in figures.items():
        floor = kinds[FLOOR].cosine_mean if FLOOR in kinds else None
        mean = (
            float(found[CLASS_MEAN].cosine[name][means.has_mean].mean())
            if isinstance(means, ClassMeans) and beside
            else None
        )
        for kind, one in kinds.items():
            kinds[kind] = replace(one, class_mean_cosine=mean, floor_cosine=floor)
    decoded = None
    if DECODED in guesses:
        victims = slice(count, len(near))
        dense = {name: guesses[DECODED](name, victims).clone() for name in observed}  # not a view of the held-out ones
        decoded = with_saved(pairs.target, observed, Gradient(dense))
    matrices = {kind: one.matrices for kind, one in decoders.items() if isinstance(one, MatrixDecoder)}
    return Scored(figures, decoded, matrices)


def _guess(decoder: Decoder, updates: Updates) -> Guess:
    """A decoder's output for updates [n, d_out, r]; a `MatrixDecoder` decodes rows only when they are asked for."""
    if isinstance(decoder, MatrixDecoder):
        matrices = decoder.matrices
        return lambda name, rows: updates[name][rows] @ matrices[name].to(updates[name])
    dense = decoder.decode(updates).dense
    return lambda name, rows: dense[name][rows]


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

"""Whether adapters gave away their training images: a test of one route against its controls.

The judged route is named in advance, so that the best of many routes is not taken for a finding. With one adapter, its
score is ranked among those of the simulated controls: under exchangeability p = (1 + #{control >= victim}) / (M + 1) is
at most alpha with probability at most alpha (Davison and Hinkley 1997, section 4.2). With several adapters, the mean
score is ranked among the means of M sets of controls, and the paired differences must lie above 0 by a bootstrap over
victims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor

import torch
from torch import Tensor

from r2f_ext.audit.metrics import CONFIDENCE, mean_interval

JUDGED_ROUTE = "amortised"
SIMULATED_CONTROLS = ("noise_adapter", "same_label_stranger")
DECISIVE = (*SIMULATED_CONTROLS, "class_mean", "mean_image")  # nearest_proxy is made from the reconstruction itself
CONTROL_WORDS = {
    "noise_adapter": "adapters of noise with the same norms",
    "same_label_stranger": "adapters of other images with the same label",
    "class_mean": "the mean proxy image of its class",
    "mean_image": "the mean proxy image",
    "shuffled_adapter": "the reconstruction from another adapter",
}
NO_PROOF = "This is no proof of safety: another proxy, more proxy images or another attack may recover more."
ANOTHER_BASE = "Not judged: what is estimated at another base's weights says nothing of the private images."
NEARER_DB = 3.0  # mean PSNR above the judged route's from which on a report mentions a route that is not tested
UNSCORED = "No private images were given, so nothing is scored; look at the pictures."


@dataclass(frozen=True)
class Comparison:
    """How far the judged route's PSNR lies above a control's.

    Attributes:
        difference_db: mean over victims (and over the simulated adapters of the control).
        interval_db: bootstrap interval of that mean at CONFIDENCE, over victims, or over the simulated adapters if
            there is one victim; None for one victim and one image.
        p_value: by rank among simulated adapters; None where the control is one image for each victim.
        simulated: number of simulated adapters for each victim.
    """

    difference_db: float
    interval_db: tuple[float, float] | None
    p_value: float | None
    simulated: int | None

    @property
    def above(self) -> bool:
        """Whether the route is above the control at CONFIDENCE."""
        lower = self.difference_db if self.interval_db is None else self.interval_db[0]
        return lower > 0 and (self.p_value is None or self.p_value <= 1 - CONFIDENCE)

    @property
    def words(self) -> str:
        """ "+1.2 dB (95 % interval 0.9 to 1.5 dB; p = 0.005)"."""
        details = []
        if self.interval_db is not None:
            details.append(f"{CONFIDENCE:.0%} interval {self.interval_db[0]:.1f} to {self.interval_db[1]:.1f} dB")
        if self.p_value is not None:
            details.append(f"p = {self.p_value:.3f}")
        return f"{self.difference_db:+.1f} dB" + (f" ({'; '.join(details)})" if details else "")


@dataclass(frozen=True)
class LeakVerdict:
    """The conclusion for a set of victims, or for a report.

    Attributes:
        leak: None where it was not judged.
        beyond_control_db, interval_db: of the comparison with the control that comes closest.
        confidence: of the intervals; the rank test's level is 1 - confidence.
        p_value: the largest of the simulated controls.
        sentences: the conclusion first.
        comparisons: control -> comparison, of all decisive controls.
    """

    leak: bool | None
    beyond_control_db: float | None = None
    interval_db: tuple[float, float] | None = None
    confidence: float = CONFIDENCE
    p_value: float | None = None
    sentences: tuple[str, ...] = ()
    comparisons: dict[str, Comparison] = field(default_factory=dict)


def compare(scores: Tensor, control: Tensor, seed: int) -> Comparison:
    """Compare the PSNR of n victims, [n], with that of their controls, [n, M]."""
    differences = scores[:, None] - control
    simulated = control.shape[1]
    p_value = None
    if simulated > 1:
        p_value = (1 + int((control.mean(0) >= scores.mean()).sum())) / (simulated + 1)
    sample = differences.mean(1) if len(scores) > 1 else differences[0]
    interval = mean_interval(sample.numpy(), seed)
    return Comparison(float(differences.mean()), interval, p_value, simulated if simulated > 1 else None)


def judge(
    scores: Tensor, controls: Mapping[str, Tensor], far: Tensor, seed: int, foreign: Tensor | None = None
) -> LeakVerdict:
    """The conclusion for n victims of one set.

    Args:
        scores: [n], PSNR of the judged route's estimates in dB.
        controls: name -> [n, M], PSNR of the controls; without the simulated ones nothing is judged.
        far: bool [n], victims whose update resembles no proxy update: the route says nothing of them.
        foreign: bool [n], victims whose update cannot come from the base: nothing is said of them either. None: none.
    """
    missing = [name for name in SIMULATED_CONTROLS if name not in controls]
    if missing:
        return LeakVerdict(None, sentences=("Not judged: the controls could not be simulated.",))
    if foreign is not None and bool(foreign.any()):
        if bool(foreign.all()):
            return LeakVerdict(None, sentences=(ANOTHER_BASE,))
        left = judge(scores[~foreign], {name: each[~foreign] for name, each in controls.items()}, far[~foreign], seed)
        which = f"{int(foreign.sum())} of {len(foreign)} updates, which cannot come from this base"
        return replace(left, sentences=(*left.sentences, f"Left out: {which}."))
    if bool(far.all()):
        which = "the update lies" if len(far) == 1 else f"all {len(far)} updates lie"
        return LeakVerdict(
            None,
            sentences=(
                f"Not judged: {which} far from every proxy update, so the judged route ({JUDGED_ROUTE}) cannot be "
                "trusted; a proxy that is nearer to the private images may tell more, if the base is the adapter's.",
            ),
        )
    near = ~far
    names = [name for name in controls if name in DECISIVE or (name == "shuffled_adapter" and int(near.sum()) > 1)]
    found = {name: compare(scores[near], controls[name][near], seed) for name in names}
    leak = all(each.above for each in found.values())
    closest = min(found.values(), key=lambda each: each.difference_db)
    p_value = max(found[name].p_value or 0.0 for name in SIMULATED_CONTROLS)
    return LeakVerdict(
        leak,
        closest.difference_db,
        closest.interval_db,
        CONFIDENCE,
        p_value,
        _sentences(leak, found, far),
        found,
    )


def _sentences(leak: bool, found: dict[str, Comparison], far: Tensor) -> tuple[str, ...]:
    judged = int((~far).sum())
    one = judged == 1
    against = "; ".join(f"{CONTROL_WORDS[name]}: {each.words}" for name, each in found.items())
    if leak:
        what = "The adapter gave away its training image" if one else f"The {judged} adapters gave away training images"
        first = f"{what} beyond what is known without {'it' if one else 'them'}, by the judged route ({JUDGED_ROUTE})."
    else:
        failed = ", ".join(CONTROL_WORDS[name] for name, each in found.items() if not each.above)
        first = (
            f"No leak is shown by the judged route ({JUDGED_ROUTE}): its "
            f"{'estimate is' if one else 'estimates are'} not reliably nearer to the training "
            f"{'image' if one else 'images'} than {failed}."
        )
    over = "the simulated adapters" if one else "victims"
    sentences = [first, f"PSNR above {against}. Intervals: bootstrap over {over}; p: rank among simulated adapters."]
    left_out = int(far.sum())
    if left_out:
        verb = "lies" if left_out == 1 else "lie"
        sentences.append(
            f"{left_out} of {len(far)} updates {verb} far from every proxy update: the test leaves them out."
        )
    return tuple(sentences)


def with_nearer_routes(
    verdict: LeakVerdict, judged: Tensor, others: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> LeakVerdict:
    """The verdict with a sentence on each route whose images are clearly nearer than the judged ones, after the first.

    The test says nothing of such a route. Without the sentence, "no leak is shown" would stand alone beside its images.
    Of images that are called exact the report says more than that.

    Args:
        judged: [n], PSNR of the judged route in dB; others: route -> [n].
        exact: route -> bool [n], which of its images are called exact; routes that cannot tell are left out.
    """
    sentences = []
    for route, scores in others.items():
        left = ~exact.get(route, torch.zeros(len(scores), dtype=torch.bool))
        if route == JUDGED_ROUTE or not bool(left.any()):
            continue
        own, test = float(scores[left].mean()), float(judged[left].mean())
        if own - test >= NEARER_DB:
            mean = " on average" if int(left.sum()) > 1 else ""
            which = "" if bool(left.all()) else " on what is not exact"
            sentences.append(
                f"Not part of the test: {route} came nearer{which}, to {own:.1f} dB{mean}, where the judged route has "
                f"{test:.1f} dB."
            )
    return replace(verdict, sentences=(*verdict.sentences[:1], *sentences, *verdict.sentences[1:]))


@dataclass(frozen=True)
class ExactImage:
    """What one route says of the exactness of one victim's image; see `inversion/exactness.py`."""

    set: str
    victim: int
    route: str
    exact: bool
    bound_db: float | None
    free_directions: int | None
    words: str


def conclude(sets: Mapping[str, LeakVerdict], exact: Sequence[ExactImage]) -> LeakVerdict:
    """The verdict of a report: first what is exact, then the test of each set, last that this does not prove safety.

    Args:
        sets: set -> its verdict.
        exact: of every route that says so, victim by victim.
    """
    recovered = [one for one in exact if one.exact and one.bound_db is not None]
    order = sorted(sets.values(), key=lambda one: {True: 0, False: 1, None: 2}[one.leak])
    leading = order[0]
    sentences = list(_exact_sentences(recovered, sets))
    for name, one in sets.items():
        sentences += [f"{name}: {text}" if len(sets) > 1 else text for text in one.sentences]
    return LeakVerdict(
        True if recovered else leading.leak,
        leading.beyond_control_db,
        leading.interval_db,
        CONFIDENCE,
        leading.p_value,
        (*sentences, NO_PROOF),
    )


def _exact_sentences(recovered: Sequence[ExactImage], sets: Mapping[str, LeakVerdict]) -> list[str]:
    """One sentence for each set and route: which images are exact, and to how many dB at least."""
    groups: dict[tuple[str, str], list[ExactImage]] = {}
    for one in recovered:
        groups.setdefault((one.set, one.route), []).append(one)
    sentences = []
    for (name, route), images in groups.items():
        bound = min(one.bound_db for one in images if one.bound_db is not None)
        which = ", ".join(str(one.victim + 1) for one in images)
        where = f" of {name}" if len(sets) > 1 else ""
        sentences.append(
            f"Recovered exactly{where} by {route}: training image{'s' * (len(images) > 1)} {which}, "
            f"to {floor(bound)} dB or more."
        )
    return sentences

"""One set of victims in a report: reconstructions beside originals and controls, scored and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from r2f_ext.audit.accuracy import DECODED, true_cosines
from r2f_ext.audit.base_check import BaseCheck
from r2f_ext.audit.controls import Controls, has_class, make_controls, simulated_psnr
from r2f_ext.audit.inputs import pair_up
from r2f_ext.audit.metrics import psnr_db, score, ssim
from r2f_ext.audit.run import AuditResult
from r2f_ext.audit.schema import RouteFigures, SetFigures
from r2f_ext.audit.verdict import (
    ANOTHER_BASE,
    JUDGED_ROUTE,
    UNSCORED,
    ExactImage,
    LeakVerdict,
    judge,
    with_nearer_routes,
)
from r2f_ext.data import ImageSet
from r2f_ext.inversion.exactness import Exactness, exactness_of
from r2f_ext.types import Reconstruction


@dataclass(frozen=True)
class SetReport:
    """One set of n victims: their originals (if given), their reconstructions by each route, and the controls.

    Attributes:
        name: set name in report.json.
        proxy: name of the proxy that was used.
        count: n.
        reconstructions: one per route; images [n, c, h, w].
        originals: [n, c, h, w], or None where no private images were given.
        labels: [n] true labels, or None.
        controls: None where there are no originals to compare with.
        notes: sentences that qualify the figures.
        control_scores: control -> PSNR in dB [n, m], m images for each victim; empty without originals.
        judgement: the test of the judged route against the controls.
        true_cosines: layer -> decoder -> [n] cosine of the decoded with the true gradient; empty without originals.
        far: bool [n], victims whose update resembles no proxy update.
        pairing: how victims and private images were brought together, one sentence; None without originals.
    """

    name: str
    proxy: str
    count: int
    reconstructions: list[Reconstruction]
    originals: Tensor | None
    labels: Tensor | None
    controls: Controls | None
    notes: tuple[str, ...] = ()
    control_scores: dict[str, Tensor] = field(default_factory=dict)
    judgement: LeakVerdict = field(default_factory=lambda: LeakVerdict(None, sentences=(UNSCORED,)))
    true_cosines: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    far: Tensor | None = None
    pairing: str | None = None

    def exact(self) -> list[ExactImage]:
        """What the routes say about exactness, victim by victim; routes that cannot be exact are left out."""
        return [
            ExactImage(self.name, victim, found.route, **asdict(one))
            for found in self.reconstructions
            for victim, one in enumerate(_exactness(found) or ())
        ]

    @property
    def figures(self) -> SetFigures:
        """What report.json holds of this set."""
        return SetFigures(
            n=self.count,
            proxy=self.proxy,
            routes={found.route: self._figures_of(found) for found in self.reconstructions},
            controls={name: float(values.mean()) for name, values in self.control_scores.items()},
            control_intervals=self.judgement.comparisons,
            judged_route=JUDGED_ROUTE,
            leak=self.judgement.leak,
            verdict=self.judgement.sentences[0],
            sentences=list(self.judgement.sentences),
            pairing=self.pairing,
            far_from_proxy=None if self.far is None else self.far.tolist(),
            notes=list(self.notes),
        )

    def _figures_of(self, found: Reconstruction) -> RouteFigures:
        right = None
        if self.labels is not None and found.labels is not None:
            right = float((found.labels.cpu() == self.labels).float().mean())
        per_victim = {name: values.tolist() for name, values in found.per_victim.items()}
        figures = RouteFigures(found.why, found.details, per_victim, _exactness(found), right)
        if self.originals is None:
            return figures
        images = found.images.cpu()
        psnr, similarity = psnr_db(images, self.originals), ssim(images, self.originals)
        over_images: dict[str, Any] = score(psnr, similarity)
        return replace(figures, **over_images, psnr_db=psnr.tolist(), ssim=similarity.tolist())


def _exactness(found: Reconstruction) -> list[Exactness] | None:
    """Of each victim; None where the route cannot tell."""
    if "exact" not in found.per_victim:
        return None
    return [exactness_of(found, victim) for victim in range(len(found.images))]


def set_report(
    name: str,
    result: AuditResult,
    proxy: ImageSet,
    private: ImageSet | None,
    rows: slice = slice(None),
    not_judged: str | None = None,
) -> SetReport:
    """Select the victims `rows` of an audit and compare them with their originals.

    Args:
        private: at least as many images as victims, see `pair_up`; None: nothing is scored.
        not_judged: why the judged route is not tested on these victims, one sentence; None: it is.
    """
    parts = [found.take(rows) for found in result.reconstructions]
    count = len(range(result.problem.victims)[rows])
    part = SetReport(name, proxy.name, count, parts, None, None, None)
    check, foreign = result.base_check, result.base_check.foreign[rows]
    if result.estimates is None:
        part = _without_estimates(part, result.failed, private)
        return replace(part, judgement=_with_refusal(part.judgement, check))
    far, estimate = result.estimates.far[rows], result.estimates.images[rows].cpu()
    part = replace(part, notes=_far_notes(far & ~foreign, check, rows), far=far)
    if private is None:
        unscored = LeakVerdict(None, sentences=(ANOTHER_BASE if bool(foreign.all()) else UNSCORED,))
        return replace(part, judgement=_with_refusal(unscored, check))
    pairing = pair_up(private, estimate)
    matched, paired = pairing.matched, pairing.originals
    originals, labels = paired.batch(slice(None)), paired.labels if paired.labels_known else None
    candidates = private.batch(slice(None)) if matched else None
    # Shuffled control: each victim gets the reconstruction from another victim's adapter.
    shuffled = estimate.roll(1, 0) if len(estimate) > 1 else result.estimates.stranger
    controls = make_controls(proxy, labels, estimate, shuffled)
    scores = {control: psnr_db(images, originals)[:, None] for control, images in controls.items().items()}
    if result.simulated is not None:
        pools = result.simulated.pools(rows, labels)
        # The pictures are the first simulated image of each victim.
        firsts = {name: torch.stack([images[0] for images in pool]) for name, pool in pools.items()}
        controls = replace(controls, **firsts)
        scores |= {name: simulated_psnr(pool, originals, candidates) for name, pool in pools.items()}
    # After matching, the set of the other adapters' reconstructions is the same, so this control tests nothing.
    tested = {control: one for control, one in scores.items() if control != "shuffled_adapter" or not matched}
    judged = psnr_db(estimate, originals)
    if not_judged is None:
        judgement = judge(judged, tested, far, result.config.seed, foreign)
    else:
        judgement = LeakVerdict(None, sentences=(not_judged,))
    if not bool(foreign.any()):
        others = {found.route: psnr_db(found.images.cpu(), originals) for found in parts}
        exact = {found.route: found.per_victim["exact"] == 1 for found in parts if "exact" in found.per_victim}
        judgement = with_nearer_routes(judgement, judged, others, exact)
    return replace(
        part,
        originals=originals,
        labels=labels,
        controls=controls,
        notes=(*part.notes, *_class_notes(proxy, labels)),
        control_scores=scores,
        judgement=_with_refusal(judgement, check),
        true_cosines=_true_cosines(
            result, rows, originals, result.estimates.labels[rows] if labels is None else labels
        ),
        pairing=pairing.sentence,
    )


def _without_estimates(part: SetReport, failed: Mapping[str, str], private: ImageSet | None) -> SetReport:
    """A set of which the judged route says nothing; what other routes found is scored where the images are known."""
    why = next((failed[stage] for stage in ("pairs", "estimates") if stage in failed), "")
    part = replace(part, judgement=LeakVerdict(None, sentences=(f"Not judged: {why[:1].lower()}{why[1:]}",)))
    if private is None or not part.reconstructions:
        return part
    pairing = pair_up(private, _most_exact(part.reconstructions).images)
    labels = pairing.originals.labels if pairing.originals.labels_known else None
    return replace(part, originals=pairing.originals.batch(slice(None)), labels=labels, pairing=pairing.sentence)


def _most_exact(found: list[Reconstruction]) -> Reconstruction:
    """The reconstruction with the most images that are exact, the first among equals."""
    return max(found, key=lambda one: float(one.per_victim.get("exact", torch.zeros(1)).sum()))


def _true_cosines(result: AuditResult, rows: slice, originals: Tensor, labels: Tensor) -> dict[str, dict[str, Tensor]]:
    """Of the victims `rows`: see `true_cosines`."""
    target, observed = result.problem.target, result.problem.observed
    assert target is not None and observed is not None
    victims, decoded = range(result.problem.victims)[rows], result.scored.decoded

    def by_matrix(matrices: dict[str, Tensor]) -> Callable[[str, int], Tensor]:
        return lambda name, victim: observed[name][victims[victim]] @ matrices[name]

    guesses = {kind: by_matrix(matrices) for kind, matrices in result.scored.matrices.items()}
    if decoded is not None:
        guesses[DECODED] = lambda name, victim: decoded.dense[name][victims[victim]]
    return true_cosines(target, guesses, originals, labels)


def _class_notes(proxy: ImageSet, labels: Tensor | None) -> tuple[str, ...]:
    if labels is None:
        return ("The private images have no labels: there is no class mean.",)
    if proxy.random_labels:
        return (f"The labels of '{proxy.name}' are random: its class mean is a mean of arbitrary images.",)
    missing = sorted(set(labels[~has_class(proxy, labels)].tolist()))
    if not missing:
        return ()
    which = f"class{'es' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    if bool(has_class(proxy, labels).any()):
        return (f"The proxy holds no image of {which}: the mean image stands in for the class mean.",)
    return (f"The proxy holds no image of {which}: there is no class mean.",)


def _with_refusal(judgement: LeakVerdict, check: BaseCheck) -> LeakVerdict:
    """The judgement with the sentence on updates that cannot come from the base: put first, or second after a leak."""
    if check.refusal is None:
        return judgement
    first = judgement.sentences[:1] if judgement.leak else ()
    return replace(judgement, sentences=(*first, check.refusal, *judgement.sentences[len(first) :]))


def _far_notes(far: Tensor, check: BaseCheck, rows: slice) -> tuple[str, ...]:
    """A sentence on the updates far from every proxy update; `far` [n] are those that may come from this base."""
    count = int(far.sum())
    if count == 0:
        return ()
    which = "The update lies" if len(far) == 1 else f"{count} of {len(far)} updates {'lies' if count == 1 else 'lie'}"
    if bool(check.confirmed[rows][far].all()):
        why = f"the proxy may not fit this data, or other layers than {check.layer} are not those of the training"
    else:
        why = "the proxy may not fit this data, or the base or the recipe is not the adapter's"
    return (f"{which} far from every proxy update: {why}.",)

"""The audit of adapters that share one start: pairs -> decoders -> routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from r2f_ext.audit.accuracy import CLASS_MEAN, DECODED, ClassMeans, Figures, Learner, Scored, each, score_and_decode
from r2f_ext.audit.base_check import BaseCheck, check_base
from r2f_ext.audit.controls import Simulated, simulate
from r2f_ext.audit.memory import fit_to_memory, start_images
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet
from r2f_ext.decoders import DEFAULT_KINDS, KINDS, Updates
from r2f_ext.errors import R2FError, expected
from r2f_ext.inversion.label_by_label import NEAR_PAIRS
from r2f_ext.inversion.route import Problem, Proxies, Verdict
from r2f_ext.inversion.routes import (
    LACKING,
    check_runnable,
    default_routes,
    registry,
    run_routes,
    verdicts_of,
)
from r2f_ext.linalg import first_not_finite
from r2f_ext.models.evidence import start_notes
from r2f_ext.pairs import GeneratedPairs, PairSource
from r2f_ext.progress import Advance, Stages
from r2f_ext.types import PairBatch, Reconstruction

LATER = ("proxies", "decoded")  # fields of a problem that the stages fill in before the routes run
MIN_PAIRS = 40  # with fewer there are too few pairs to hold out
MAX_LABELS = 20  # with more private labels than this, strangers are simulated only for the labels that a route found
# What failed -> a sentence on what is missing because of it; the reason is appended.
CONSEQUENCES = {
    "pairs": "No proxy pairs could be made, so nothing that needs them was done",
    **dict.fromkeys(DEFAULT_KINDS, "The decoder {} failed, so its figures are missing"),
    DECODED: "The decoder {} failed, so there are no decoded gradients",
    CLASS_MEAN: "The class mean gradients could not be added up, so they do not stand beside the decoders",
    "decode": "The decoders could not be scored, so there are no decoded gradients",
    "estimates": "The judged route gave no estimates, so nothing is judged",
    "controls": "The controls could not be simulated",
}


@dataclass(frozen=True)
class Estimates:
    """What the amortised estimate says of V victims, whichever routes ran.

    Attributes:
        images: [V, c, h, w]: they decide which private image belongs to which victim, and the image controls are
            computed from them.
        labels: int64 [V], as the amortised route finds them or a saved head tells them.
        far: bool [V], victims whose update resembles no proxy update.
        stranger: [1, c, h, w], the estimate from the update of a proxy sample drawn by the seed: the shuffled-adapter
            control of a single victim.
    """

    images: Tensor
    labels: Tensor
    far: Tensor
    stranger: Tensor


@dataclass(frozen=True)
class AuditResult:
    """The results of an audit of V adapters. What a stage that failed would have given is missing, see `failed`.

    Attributes:
        pair_count, pairs_per_second: of the generation pass; 0 where it failed.
        problem: what was audited, without the proxies.
        scored: the decoders' figures, and the gradients that they decode, times the victims' learning rate.
        reconstructions: one per route that ran, images [V, c, h, w].
        verdicts: route -> verdict, of every route in the registry.
        not_run: requested routes that did not run -> the reason.
        estimates: None where there are no pairs, or the judged route failed.
        simulated: the amortised route's images for noise and stranger adapters; None if there are no pairs, or if the
            simulation failed.
        failed: what failed, by its name in `CONSEQUENCES` -> a sentence on what is missing because of it, and why.
        base_check: whether the updates can come from the base's weights.
        seconds: stage -> wall time.
        config: the seeds and sizes used, after `fit_to_memory`; `pairs` as asked for, see `pair_count`.
        notes: sentences that qualify the figures, those of `failed` first.
    """

    pair_count: int
    pairs_per_second: float
    problem: Problem
    scored: Scored
    reconstructions: list[Reconstruction]
    verdicts: dict[str, Verdict]
    not_run: dict[str, str]
    estimates: Estimates | None
    simulated: Simulated | None
    failed: dict[str, str]
    base_check: BaseCheck
    seconds: dict[str, float]
    config: AuditConfig
    notes: tuple[str, ...]

    @property
    def decoders(self) -> Figures:
        return self.scored.figures


def run_audit_stages(
    problem: Problem,
    proxy: ImageSet,
    config: AuditConfig | None = None,
    stages: Stages | None = None,
    verdicts: dict[str, Verdict] | None = None,
    labels: Tensor | None = None,
) -> AuditResult:
    """Audit adapters that started from the same A (the clients of one server, or a single one).

    A stage that fails for lack of memory or for numerical reasons does not end the audit: results that need it are
    missing, and the result says so.

    Args:
        problem: from `adapter_problem`.
        proxy: public or generated images with labels.
        verdicts: of every route, from `verdicts_of(problem)`, if already computed.
        labels: int64, those of the private images, if known: strangers of these are simulated too.

    Raises:
        R2FError: a proxy that is too small, sizes that do not fit memory, an unknown name in `config.routes`, or none
            of the chosen routes can run.
    """
    config, stages = config or AuditConfig(), stages or Stages()
    target, a = problem.target, problem.a
    assert target is not None and a is not None
    pairs = GeneratedPairs(target, a, proxy, precision=config.precision)
    count = min(config.pairs, len(pairs))
    if count < MIN_PAIRS:
        raise R2FError(
            f"proxy '{proxy.name}' gives {count} pairs: at least {MIN_PAIRS} are needed, thousands are good."
        )
    config = fit_to_memory(target, problem.victims, count, config)
    verdicts = verdicts_of(problem) if verdicts is None else verdicts
    names = chosen_routes(config)
    check_runnable(problem, verdicts, names, later=LATER)
    held_out = min(config.held_out, count // 4)
    fitted = min(config.decoder_pairs, count - held_out)
    # `pairs` stays as asked for: a replay must load the same images before it drops private ones.
    config = replace(config, decoder_pairs=fitted, held_out=held_out)
    if problem.public is not None:
        most = config.start_images or start_images(target, count, max(NEAR_PAIRS, len(problem.public.images)))
        config = replace(config, start_images=most)
        problem = replace(problem, public=replace(problem.public, most=most, precision=config.precision))

    failed: dict[str, str] = {}
    updates, scored = _updates_and_decoders(problem, pairs, count, proxy.labels, config, stages, failed)
    proxies = None
    if updates is not None:
        device = target.base.device
        images, proxy_labels = proxy.batch(slice(0, count), device), proxy.labels[:count].to(device)
        proxies = Proxies(updates, images, proxy_labels, target.base.num_classes)
    posed = with_settings(replace(problem, proxies=proxies, decoded=scored.decoded), config)
    outcome = run_routes(posed, verdicts, names, stages)
    found, not_run = outcome.reconstructions, outcome.not_run
    del outcome  # its error holds the tensors of a route that failed
    estimates = simulated = None
    if proxies is not None:
        with stages.stage("control"):
            estimates = _estimates(posed, found, config, failed)
            simulated = None if estimates is None else _simulated(posed, proxy, labels, config, failed)
    said = {name: f"{CONSEQUENCES[name].format(name)}: {why}" for name, why in failed.items()}
    base_check = check_base(posed)
    return AuditResult(
        0 if updates is None else count,
        0.0 if updates is None else count / stages.seconds["pairs"],
        problem,
        scored,
        found,
        verdicts,
        _reasons(not_run, posed, said),
        estimates,
        simulated,
        said,
        base_check,
        dict(stages.seconds),
        config,
        (*said.values(), *_notes(problem), *base_check.notes),
    )


def _updates_and_decoders(
    problem: Problem,
    pairs: PairSource,
    count: int,
    labels: Tensor,
    config: AuditConfig,
    stages: Stages,
    failed: dict[str, str],
) -> tuple[dict[str, Tensor] | None, Scored]:
    """The updates of `count` pairs, name -> [count, d_out * r], and the decoders' figures and decoded gradients.

    If the pairs fail, both are missing; a decoder that fails is left out. `failed` gets the reasons.
    """
    assert problem.observed is not None
    fitted, held_out = config.decoder_pairs, config.held_out
    learners: dict[str, Learner] = {kind: KINDS[kind]() for kind in DEFAULT_KINDS}
    learners[CLASS_MEAN] = ClassMeans(labels[:count], fitted, held_out)
    try:
        with stages.stage("pairs", count) as advance:
            updates = generate(pairs, count, learners, fitted, advance, failed)
    except Exception as error:
        failed.clear()  # without pairs it does not matter which decoders failed
        failed["pairs"] = expected(error)
        return None, Scored()
    with stages.stage("decoders"):
        each(learners, failed, lambda learner: learner.finish())
    try:
        with stages.stage("decode", fitted):
            rest = slice(fitted, fitted + held_out)
            return updates, score_and_decode(pairs, learners, updates, problem.observed, rest, failed)
    except Exception as error:
        failed["decode"] = expected(error)
        return updates, Scored()


def _estimates(
    problem: Problem, ran: list[Reconstruction], config: AuditConfig, failed: dict[str, str]
) -> Estimates | None:
    assert problem.proxies is not None and problem.observed is not None
    observed, ridge = problem.observed, problem.proxies.ridge
    try:
        labels = ridge.find_labels(observed, problem.known_labels)
        far = ridge.far_from_proxy(observed, labels)
        stranger = ridge.invert(_proxy_update(observed, problem.proxies.updates, config.seed)).images
        found = {part.route: part.images for part in ran}
        images = found["amortised"] if "amortised" in found else ridge.invert(observed, problem.known_labels).images
        return Estimates(images, labels.cpu(), far.cpu(), stranger)
    except Exception as error:
        failed["estimates"] = expected(error)
        return None


def _simulated(
    problem: Problem, proxy: ImageSet, labels: Tensor | None, config: AuditConfig, failed: dict[str, str]
) -> Simulated | None:
    likely = [] if labels is None else labels.unique().tolist()
    try:
        return simulate(problem, proxy, likely if len(likely) <= MAX_LABELS else [], config.seed, config.precision)
    except Exception as error:
        failed["controls"] = expected(error)
        return None


def _reasons(not_run: Mapping[str, str], problem: Problem, failed: Mapping[str, str]) -> dict[str, str]:
    """`not_run`, with a failed stage as the reason if it is why a route lacks a field that it reads."""
    makers = {"proxies": ("pairs",), "decoded": ("pairs", DECODED, "decode")}
    reasons = dict(not_run)
    for name in not_run:
        lacking = registry()[name].lacking(problem)
        culprits = [failed[maker] for maker in makers.get(lacking or "", ()) if maker in failed]
        if culprits and not_run[name].startswith(LACKING):
            reasons[name] = f"Not run: {culprits[0][0].lower()}{culprits[0][1:]}"
    return reasons


def with_settings(problem: Problem, config: AuditConfig) -> Problem:
    """The problem with the settings that `config` has for its routes."""
    return replace(
        problem,
        matching=config.matching,
        refinement=config.refinement,
        gauss_newton=config.search,
        matrix_free=replace(problem.matrix_free, minutes=config.search.minutes),  # one limit for every search
    )


def chosen_routes(config: AuditConfig) -> tuple[str, ...]:
    """Names of the routes that `config` asks for."""
    named = default_routes() if config.routes is None else config.routes
    return (*named, "gauss_newton") if config.gauss_newton else named


def _notes(problem: Problem) -> tuple[str, ...]:
    if problem.evidence is None:
        return ()
    return (*problem.evidence.sentences, *start_notes(problem.adapters or [], problem.steps))


def generate(
    pairs: PairSource,
    count: int,
    learners: dict[str, Learner],
    fitted: int,
    advance: Advance,
    failed: dict[str, str],
) -> dict[str, Tensor]:
    """Generate `count` pairs; learners observe the first `fitted`. Returns name -> updates [count, d_out * r].

    A learner that fails is taken out of `learners`, and `failed` says why.

    Raises:
        R2FError: the update of a pair is not finite.
    """
    collected: dict[str, list[Tensor]] = {name: [] for name in pairs.target.names}
    each(learners, failed, lambda learner: learner.start(pairs, fitted))
    first = 0
    for part in ((0, fitted), (fitted, count)):
        for batch in pairs.batches(*part):
            for name, update in batch.updates.items():
                _check_finite(name, update, first)
                collected[name].append(update.flatten(1))
            if first < fitted:
                _observe(learners, batch, failed)
            first += len(batch.labels)
            advance(len(batch.labels))
    return {name: torch.cat(parts) for name, parts in collected.items()}


def _observe(learners: dict[str, Learner], batch: PairBatch, failed: dict[str, str]) -> None:
    each(learners, failed, lambda learner: learner.observe(batch))


def _check_finite(name: str, update: Tensor, first: int) -> None:
    """Refuse updates [n, d_out, r] of the pairs from number `first` that are not finite."""
    if (row := first_not_finite(update)) is not None:
        raise R2FError(
            f"the update of {name} by proxy image {first + row} is not finite: the base or the adapter's A holds "
            "numbers that its gradient cannot be computed with; check that the base is the adapter's own."
        )


def _proxy_update(observed: Updates, proxies: dict[str, Tensor], seed: int) -> Updates:
    pick = seed % len(next(iter(proxies.values())))
    return {name: proxies[name][pick].view(1, *u.shape[1:]) for name, u in observed.items()}

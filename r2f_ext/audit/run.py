"""The audit of adapters that share one start: pairs -> decoders -> routes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from r2f_ext.audit.accuracy import Figures, score_and_decode
from r2f_ext.audit.controls import Simulated, simulate
from r2f_ext.audit.memory import fit_to_memory, start_images
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet
from r2f_ext.decoders import DEFAULT_KINDS, KINDS, Decoder, Updates
from r2f_ext.errors import R2FError, expected
from r2f_ext.inversion.patch_position import ROUTE as PATCH_POSITION
from r2f_ext.inversion.route import Problem, Proxies, Verdict
from r2f_ext.inversion.routes import check_runnable, default_routes, run_routes, verdicts_of
from r2f_ext.pairs import GeneratedPairs, PairSource
from r2f_ext.progress import Advance, Stages
from r2f_ext.types import Gradient, Reconstruction

LATER = ("proxies", "decoded")  # fields of a problem that the stages fill in before the routes run
MIN_PAIRS = 40  # with fewer there are too few pairs to hold out
MAX_LABELS = 20  # strangers are simulated for the labels of all private images up to so many, else for those found


@dataclass(frozen=True)
class AuditResult:
    """The results of an audit of V adapters.

    Attributes:
        pair_count, pairs_per_second: of the generation pass.
        problem: what was audited, without the proxies.
        decoders: layer -> kind -> figures, see `Scored`.
        decoded: the adapters' gradients as the default decoder gives them, [V, d_out, d_in] a layer, in units of the
            victim's learning rate.
        matrices: kind -> layer -> [r, d_in], decoders that multiply updates by a matrix.
        reconstructions: one per route that ran, images [V, c, h, w].
        verdicts: route -> verdict, of every route in the registry.
        not_run: requested routes that did not run -> the reason.
        estimate: [V, c, h, w], the amortised estimates, whichever routes ran: victims are paired up with private images
            by them, and the image controls are taken of them.
        stranger: [1, c, h, w], the amortised estimate from the update of a proxy sample drawn by the seed: the
            shuffled-adapter control of a single victim.
        labels: int64 [V], as the amortised route finds them or a saved head tells them.
        simulated: what the amortised route makes of noise and of strangers; None where that failed, see `notes`.
        far_from_proxy: bool [V], victims whose update resembles no proxy update.
        seconds: stage -> wall time.
        config: the sizes and seeds used, after `fit_to_memory`.
        notes: sentences that qualify the figures.
    """

    pair_count: int
    pairs_per_second: float
    problem: Problem
    decoders: Figures
    decoded: Gradient
    matrices: dict[str, dict[str, Tensor]]
    reconstructions: list[Reconstruction]
    verdicts: dict[str, Verdict]
    not_run: dict[str, str]
    estimate: Tensor
    stranger: Tensor
    labels: Tensor
    simulated: Simulated | None
    far_from_proxy: Tensor
    seconds: dict[str, float]
    config: AuditConfig
    notes: tuple[str, ...]


def run_audit_stages(
    problem: Problem,
    proxy: ImageSet,
    config: AuditConfig | None = None,
    stages: Stages | None = None,
    verdicts: dict[str, Verdict] | None = None,
    labels: Tensor | None = None,
) -> AuditResult:
    """Audit adapters that started from the same A (the clients of one server, or a single one).

    Args:
        problem: from `adapter_problem`.
        proxy: public or generated images with labels.
        verdicts: of every route, from `verdicts_of(problem)`, if already computed.
        labels: int64, those of the private images, if known: strangers of these are simulated too.

    Raises:
        R2FError: a proxy that is too small, an unknown name in `config.routes`, or every chosen route failed.
    """
    config, stages = config or AuditConfig(), stages or Stages()
    target, a, observed = problem.target, problem.a, problem.observed
    assert target is not None and a is not None and observed is not None
    pairs = GeneratedPairs(target, a, proxy, precision=config.precision)
    count = min(config.pairs, len(pairs))
    if count < MIN_PAIRS:
        raise R2FError(
            f"proxy '{proxy.name}' gives {count} pairs: at least {MIN_PAIRS} are needed, thousands are good."
        )
    config = fit_to_memory(target, problem.victims, count, config)
    verdicts = verdicts_of(problem) if verdicts is None else verdicts
    names = chosen_routes(config)
    if config.routes is None and problem.gradients is not None:
        names += (PATCH_POSITION,)
    check_runnable(problem, verdicts, names, later=LATER)
    held_out = min(config.held_out, count // 4)
    fitted = min(config.decoder_pairs, count - held_out)
    config = replace(config, pairs=count, decoder_pairs=fitted, held_out=held_out)
    if problem.public is not None:
        most = config.start_images or start_images(target, count, len(problem.public.images))
        config = replace(config, start_images=most)
        problem = replace(problem, public=replace(problem.public, most=most, precision=config.precision))

    decoders = [KINDS[kind]() for kind in DEFAULT_KINDS]
    with stages.stage("pairs", count) as advance:
        updates = generate(pairs, count, decoders, fitted, advance)
    with stages.stage("decoders"):
        for decoder in decoders:
            decoder.finish()
    with stages.stage("decode", fitted):
        scored = score_and_decode(pairs, decoders, updates, proxy.labels[:count], observed, fitted, held_out)
    decoders.clear()  # their factors are the largest tensors
    device = target.base.device
    images, proxy_labels = proxy.batch(slice(0, count), device), proxy.labels[:count].to(device)
    proxies = Proxies(updates, images, proxy_labels, target.base.num_classes)
    posed = replace(
        problem, proxies=proxies, decoded=scored.decoded, matching=config.matching, refinement=config.refinement
    )
    outcome = run_routes(posed, verdicts, names, stages)
    with stages.stage("control"):
        found_labels = proxies.ridge.find_labels(observed, problem.known_labels)
        far = proxies.ridge.far_from_proxy(observed, found_labels).cpu()
        stranger = proxies.ridge.invert(_proxy_update(observed, updates, config.seed)).images
        found = {part.route: part.images for part in outcome.reconstructions}
        estimate = (
            found["amortised"] if "amortised" in found else proxies.ridge.invert(observed, problem.known_labels).images
        )
        simulated, failure = _simulated(posed, proxy, labels, config)
    return AuditResult(
        count,
        count / stages.seconds["pairs"],
        problem,
        scored.figures,
        scored.decoded,
        scored.matrices,
        outcome.reconstructions,
        verdicts,
        outcome.not_run,
        estimate,
        stranger,
        found_labels.cpu(),
        simulated,
        far,
        dict(stages.seconds),
        config,
        (*_notes(problem), *failure),
    )


def _simulated(
    problem: Problem, proxy: ImageSet, labels: Tensor | None, config: AuditConfig
) -> tuple[Simulated | None, tuple[str, ...]]:
    """The simulated controls, and no sentence; or None and a sentence on why there are none."""
    likely = [] if labels is None else labels.unique().tolist()
    try:
        return simulate(problem, proxy, likely if len(likely) <= MAX_LABELS else [], config.seed, config.precision), ()
    except (R2FError, RuntimeError, MemoryError) as error:
        return None, (f"The controls could not be simulated: {expected(error)}",)


def chosen_routes(config: AuditConfig) -> tuple[str, ...]:
    """Names of the routes that `config` asks for."""
    named = default_routes() if config.routes is None else config.routes
    return (*named, "gauss_newton") if config.gauss_newton else named


def _notes(problem: Problem) -> tuple[str, ...]:
    adapters = problem.adapters or []
    said = () if problem.evidence is None else problem.evidence.sentences
    if problem.steps == 1 or all(one.a0 is not None for one in adapters):
        return said
    which = "their mean A stands" if len(adapters) > 1 else "its final A stands"
    return (*said, f"A before training is not known: {which} in for it, in the proxies too.")


def generate(
    pairs: PairSource,
    count: int,
    decoders: list[Decoder],
    fitted: int,
    advance: Advance,
) -> dict[str, Tensor]:
    """Generate `count` pairs; decoders observe the first `fitted`. Returns name -> updates [count, d_out * r]."""
    collected: dict[str, list[Tensor]] = {name: [] for name in pairs.target.names}
    for decoder in decoders:
        decoder.start(pairs, fitted)
    first = 0
    for part in ((0, fitted), (fitted, count)):
        for batch in pairs.batches(*part):
            for name, update in batch.updates.items():
                collected[name].append(update.flatten(1))
            if first < fitted:
                for decoder in decoders:
                    decoder.observe(batch)
            first += len(batch.labels)
            advance(len(batch.labels))
    return {name: torch.cat(parts) for name, parts in collected.items()}


def _proxy_update(observed: Updates, proxies: dict[str, Tensor], seed: int) -> Updates:
    pick = seed % len(next(iter(proxies.values())))
    return {name: proxies[name][pick].view(1, *u.shape[1:]) for name, u in observed.items()}

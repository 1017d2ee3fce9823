"""The audit of adapters that share one start: pairs -> decoders -> routes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from r2f_ext.audit.memory import fit_to_memory
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet
from r2f_ext.decoders import DEFAULT_KINDS, KINDS, Decoder, Updates, held_out_cosines, with_saved
from r2f_ext.errors import R2FError
from r2f_ext.inversion.route import Problem, Proxies, Verdict, adapter_problem
from r2f_ext.inversion.routes import check_runnable, default_routes, run_routes, verdicts_of
from r2f_ext.models import AdapterFacts, InitialFactors
from r2f_ext.pairs import GeneratedPairs, PairSource
from r2f_ext.progress import Advance, Stages
from r2f_ext.types import Gradient, LoraUpdate, Reconstruction, Target

MIN_PAIRS = 40  # with fewer there are too few pairs to hold out


@dataclass(frozen=True)
class AuditResult:
    """The results of an audit of V adapters.

    Attributes:
        pair_count, pairs_per_second: of the generation pass.
        decoders: layer -> kind -> {cosine_mean, cosine_p05, norm_error} on held-out pairs.
        decoded: the adapters' gradients as the default decoder gives them, [V, d_out, d_in] a layer, in units
            of the victim's learning rate.
        reconstructions: one per route that ran, images [V, c, h, w].
        verdicts: route -> verdict, of every route in the registry.
        not_run: requested routes that did not run -> the reason.
        estimate: [V, c, h, w], the amortised estimates, whichever routes ran: victims are paired up with private images
            by them, and the image controls are taken of them.
        stranger: [1, c, h, w], the amortised estimate from the update of a proxy sample drawn by the seed: the
            shuffled-adapter control of a single victim.
        far_from_proxy: bool [V], victims whose update resembles no proxy update.
        seconds: stage -> wall time.
        config: the sizes and seeds used, after `fit_to_memory`.
        notes: sentences that qualify the figures.
    """

    pair_count: int
    pairs_per_second: float
    decoders: dict[str, dict[str, dict[str, float]]]
    decoded: Gradient
    reconstructions: list[Reconstruction]
    verdicts: dict[str, Verdict]
    not_run: dict[str, str]
    estimate: Tensor
    stranger: Tensor
    far_from_proxy: Tensor
    seconds: dict[str, float]
    config: AuditConfig
    notes: tuple[str, ...]


def run_audit_stages(
    target: Target,
    adapters: list[LoraUpdate],
    proxy: ImageSet,
    config: AuditConfig | None = None,
    stages: Stages | None = None,
    initial: InitialFactors | None = None,
    verdicts: dict[str, Verdict] | None = None,
    facts: tuple[AdapterFacts, ...] = (),
) -> AuditResult:
    """Audit adapters that started from the same A (the clients of one server, or a single one).

    Args:
        target: base and adapted layers, from `attach`.
        adapters: the victims' factors; all with the same A up to training.
        proxy: public or generated images with labels.
        initial: source of A before the first step; None: common seeds are tried.
        verdicts: of every route, from `verdicts_of(adapter_problem(target, adapters, initial))`, if already computed.
        facts: what the adapters' folders say beside their factors.

    Raises:
        R2FError: a proxy that is too small, adapters with different initial A's, or an unknown name in `config.routes`.
    """
    config, stages = config or AuditConfig(), stages or Stages()
    problem = adapter_problem(target, adapters, initial, facts)
    a, observed = problem.a, problem.observed
    assert a is not None and observed is not None
    pairs = GeneratedPairs(target, a, proxy, precision=config.precision)
    count = min(config.pairs, len(pairs))
    if count < MIN_PAIRS:
        raise R2FError(
            f"proxy '{proxy.name}' gives {count} pairs: at least {MIN_PAIRS} are needed, thousands are good."
        )
    config = fit_to_memory(target, len(adapters), count, config)
    verdicts = verdicts_of(problem) if verdicts is None else verdicts
    check_runnable(problem, verdicts, chosen_routes(config), later=("proxies", "decoded"))
    held_out = min(config.held_out, count // 4)
    fitted = min(config.decoder_pairs, count - held_out)
    config = replace(config, pairs=count, decoder_pairs=fitted, held_out=held_out)

    decoders = [KINDS[kind]() for kind in DEFAULT_KINDS]
    with stages.stage("pairs", count) as advance:
        updates = generate(pairs, count, decoders, fitted, advance)
    with stages.stage("decoders"):
        for decoder in decoders:
            decoder.finish()
    with stages.stage("decode", fitted) as advance:
        scored, decoded = score_and_decode(pairs, decoders, updates, observed, fitted, held_out)
    device = target.base.device
    images, labels = proxy.batch(slice(0, count), device), proxy.labels[:count].to(device)
    proxies = Proxies(updates, images, labels, target.base.num_classes)
    problem = replace(problem, proxies=proxies, decoded=decoded, matching=config.matching, refinement=config.refinement)
    outcome = run_routes(problem, verdicts, chosen_routes(config), stages)
    with stages.stage("control"):
        far = proxies.ridge.far_from_proxy(observed, problem.known_labels).cpu()
        stranger = proxies.ridge.invert(_proxy_update(observed, updates, config.seed)).images
        found = {part.route: part.images for part in outcome.reconstructions}
        estimate = (
            found["amortised"] if "amortised" in found else proxies.ridge.invert(observed, problem.known_labels).images
        )
    return AuditResult(
        count,
        count / stages.seconds["pairs"],
        scored,
        decoded,
        outcome.reconstructions,
        verdicts,
        outcome.not_run,
        estimate,
        stranger,
        far,
        dict(stages.seconds),
        config,
        _notes(problem),
    )


def chosen_routes(config: AuditConfig) -> tuple[str, ...]:
    """Names of the routes that `config` asks for."""
    named = default_routes() if config.routes is None else config.routes
    return (*named, "gauss_newton") if config.gauss_newton else named


def _notes(problem: Problem) -> tuple[str, ...]:
    adapters = problem.adapters or []
    if problem.steps == 1 or all(one.a0 is not None for one in adapters):
        return ()
    which = "their mean A stands" if len(adapters) > 1 else "its final A stands"
    return (f"A before training is not known: {which} in for it, in the proxies too.",)


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


def score_and_decode(
    pairs: PairSource,
    decoders: list[Decoder],
    updates: dict[str, Tensor],
    observed: Updates,
    fitted: int,
    held_out: int,
) -> tuple[dict[str, dict[str, dict[str, float]]], Gradient]:
    """Score every decoder on the `held_out` pairs after the fitted ones, and decode the victims with the last one."""
    scored: dict[str, dict[str, dict[str, float]]] = {name: {} for name in observed}
    victims = len(next(iter(observed.values())))
    decoded = Gradient({})
    for decoder in decoders:
        both = {
            name: torch.cat(
                [
                    u,
                    updates[name][fitted : fitted + held_out].view(held_out, *u.shape[1:]),
                ]
            )
            for name, u in observed.items()
        }
        gradients = decoder.decode(both).dense
        rest = Gradient({name: g[victims:] for name, g in gradients.items()})
        cosines = held_out_cosines(rest, pairs, fitted, fitted + held_out)
        for name, figures in cosines.summary().items():
            scored[name][decoder.kind] = figures
        decoded = Gradient({name: g[:victims].clone() for name, g in gradients.items()})
    return scored, with_saved(pairs.target, observed, decoded)


def _proxy_update(observed: Updates, proxies: dict[str, Tensor], seed: int) -> Updates:
    pick = seed % len(next(iter(proxies.values())))
    return {name: proxies[name][pick].view(1, *u.shape[1:]) for name, u in observed.items()}

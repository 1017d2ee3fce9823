"""The audit of adapters that share one start: pairs -> decoders -> inversion, each stage in one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r2f_ext.audit.memory import fit_to_memory
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet
from r2f_ext.decoders import DEFAULT_KINDS, KINDS, Decoder, Updates, held_out_cosines, stack_updates
from r2f_ext.errors import R2FError
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.inversion.gauss_newton import SUBSPACE_IMAGES, Subspace, gauss_newton, obstacle
from r2f_ext.inversion.matching import MatchingConfig, Prior, match
from r2f_ext.inversion.objectives import GradientObjective, UpdateObjective
from r2f_ext.pairs import GeneratedPairs, PairSource
from r2f_ext.progress import Advance, Stages
from r2f_ext.types import Gradient, LoraUpdate, Reconstruction, Target

MIN_PAIRS = 40  # fewer leave nothing to hold out


@dataclass(frozen=True)
class AuditResult:
    """What an audit of V adapters found.

    Attributes:
        pair_count, pairs_per_second: of the generation pass.
        decoders: layer -> kind -> {cosine_mean, cosine_p05, norm_error} on held-out pairs.
        decoded: the adapters' gradients as the default decoder gives them, [V, d_out, d_in] a layer, in units
            of the victim's learning rate.
        reconstructions: one a route, images [V, c, h, w].
        stranger: [1, c, h, w], the amortised estimate from the update of a proxy sample drawn by the seed: the
            shuffled-adapter control of a single victim.
        far_from_proxy: bool [V], victims whose update no proxy update resembles.
        seconds: stage -> wall time.
    """

    pair_count: int
    pairs_per_second: float
    decoders: dict[str, dict[str, dict[str, float]]]
    decoded: Gradient
    reconstructions: list[Reconstruction]
    stranger: Tensor
    far_from_proxy: Tensor
    seconds: dict[str, float]


def audit(
    target: Target,
    adapters: list[LoraUpdate],
    proxy: ImageSet,
    config: AuditConfig | None = None,
    stages: Stages | None = None,
) -> AuditResult:
    """Audit adapters that started from the same A (the clients of one server, or a single one).

    Args:
        target: base and adapted layers, from `attach`.
        adapters: the victims' factors; all with the same A up to training.
        proxy: public or generated images with labels.

    Raises:
        R2FError: too small a proxy, or adapters of different starts.
    """
    config, stages = config or AuditConfig(), stages or Stages()
    a = _common_start(adapters)
    pairs = GeneratedPairs(target, a, proxy, precision=config.precision)
    count = min(config.pairs, len(pairs))
    if count < MIN_PAIRS:
        raise R2FError(
            f"proxy '{proxy.name}' gives {count} pairs: at least {MIN_PAIRS} are needed, thousands are good."
        )
    config = fit_to_memory(target, len(adapters), count, config)
    held_out = min(config.held_out, count // 4)
    fitted = min(config.decoder_pairs, count - held_out)
    observed = stack_updates(adapters)

    decoders = [KINDS[kind]() for kind in DEFAULT_KINDS]
    with stages.stage("pairs", count) as advance:
        updates = generate(pairs, count, decoders, fitted, advance)
    with stages.stage("decoders"):
        for decoder in decoders:
            decoder.finish()
    with stages.stage("decode", fitted) as advance:
        scored, decoded = decode(pairs, decoders, updates, observed, fitted, held_out)
    with stages.stage("amortised"):
        inverter = AmortisedInverter(
            updates,
            proxy.batch(slice(0, count), target.base.device),
            proxy.labels[:count].to(target.base.device),
            target.base.num_classes,
        )
        amortised = inverter.invert(observed)
        far = inverter.far_from_proxy(observed).cpu()
        stranger = inverter.invert(_proxy_update(observed, updates, config.seed)).images
    with stages.stage("matching", config.matching.steps) as advance:
        matching = match_decoded(target, decoded, amortised, config.matching, advance)
    with stages.stage("refinement", config.refinement.steps) as advance:
        refined = refine(target, a, observed, amortised, config.refinement, advance)
    found = [matching, amortised, refined]
    if config.gauss_newton and obstacle(target, adapters) is None:
        with stages.stage("gauss_newton", len(adapters)) as advance:
            public = proxy.batch(slice(0, SUBSPACE_IMAGES), target.base.device)
            found.append(gauss_newton(target, a, observed, amortised, Subspace.of(public), advance=advance))
    rate = count / stages.seconds["pairs"]
    return AuditResult(count, rate, scored, decoded, found, stranger, far, dict(stages.seconds))


def match_decoded(
    target: Target,
    decoded: Gradient,
    amortised: Reconstruction,
    config: MatchingConfig,
    advance: Advance,
    prior: Prior | None = None,
) -> Reconstruction:
    """Route `matching`: from a gray image towards the decoded gradient, with the amortised route's labels."""
    assert amortised.labels is not None
    return match(
        target,
        GradientObjective(decoded),
        torch.full_like(amortised.images, 0.5),
        amortised.labels,
        config,
        "matching",
        "local search from gray on the decoded gradient; on ViTs it usually stalls below the mean image",
        lambda: advance(1),
        prior=prior,
    )


def refine(
    target: Target,
    a: dict[str, Tensor],
    observed: Updates,
    amortised: Reconstruction,
    config: MatchingConfig,
    advance: Advance,
    prior: Prior | None = None,
) -> Reconstruction:
    """Route `amortised_refined`: from the amortised estimate towards the LoRA update that was observed."""
    assert amortised.labels is not None
    return match(
        target,
        UpdateObjective(target, a, observed),
        amortised.images,
        amortised.labels,
        config,
        "amortised_refined",
        "local search from the amortised estimate on the LoRA update itself",
        lambda: advance(1),
        prior=prior,
    )


def generate(
    pairs: PairSource,
    count: int,
    decoders: list[Decoder],
    fitted: int,
    advance: Advance,
) -> dict[str, Tensor]:
    """Walk once through `count` pairs: decoders observe the first `fitted`; all updates [count, d_out * r] are kept."""
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


def decode(
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
    return scored, decoded


def _common_start(adapters: list[LoraUpdate]) -> dict[str, Tensor]:
    first = adapters[0].a
    for other in adapters[1:]:
        if other.a.keys() != first.keys():
            name = sorted(other.a.keys() ^ first.keys())[0]
            raise R2FError(f"the adapters do not adapt the same layers ({name} differs): audit them one by one.")
        for name, a in other.a.items():
            if a.shape != first[name].shape or not torch.allclose(
                a, first[name], rtol=0, atol=1e-2 * float(a.abs().max())
            ):
                raise R2FError(f"the adapters do not share one start (A of {name} differs): audit them one by one.")
    return {name: torch.stack([adapter.a[name].float() for adapter in adapters]).mean(0) for name in first}


def _proxy_update(observed: Updates, proxies: dict[str, Tensor], seed: int) -> Updates:
    pick = seed % len(next(iter(proxies.values())))
    return {name: proxies[name][pick].view(1, *u.shape[1:]) for name, u in observed.items()}

"""Study `cosine`: PSNR by route as errors of a known cosine and kind are added to exact gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import ImageSet
from r2f_ext.decoders import DEFAULT_KINDS, KINDS
from r2f_ext.decoders.base import add_up
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.inversion.attention_rowspace import count_attention_rowspace
from r2f_ext.inversion.gauss_newton import search
from r2f_ext.inversion.geometry import FIRST_QKV
from r2f_ext.inversion.matching import MatchingConfig, match
from r2f_ext.inversion.objectives import GradientObjective
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.update_map import Subspace, UpdateMap, flat_units
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.studies.scene import (
    ClassMean,
    Estimates,
    Observed,
    base_of,
    closed_form,
    fit_together,
    images_of_seed,
    mean_cosine,
    mean_image_db,
    start_of,
    target_of,
    victims_of,
)
from r2f_ext.studies.study import Measured, Panel, Setting, Study, World
from r2f_ext.studies.table import Row, Table
from r2f_ext.types import Gradient, Target

VICTIMS, PAIRS = 8, 1200
QUICK_VICTIMS, QUICK_PAIRS = 2, 150
ERRORS = ("isotropic", "subspace", "decoder")
STEPS = (0.5, 0.3, 0.1, 0.03, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12)
MATCHED = {"isotropic": (0.1, 1e-12)}  # a match takes seconds a victim
SEARCHED = {"isotropic": (1e-3, 1e-8)}  # a search takes a minute
MATCHED_VICTIMS = 4  # per seed; Gauss-Newton searches for one victim
START_DB, PASSES, SEARCHED_SEEDS = 28.0, 6, 2
LEVELS_DB = (20.0, 33.0)
PUBLIC_IMAGES = 300  # they form the closed form's prior, and they span the space that Gauss-Newton searches
DECODERS = DEFAULT_KINDS  # the others cost minutes a seed; the study `decoder` compares them all
PUBLIC = "attention_rowspace, public images"
SEARCH = "gauss_newton, from 28 dB"


@dataclass(frozen=True)
class Scene:
    """One seed's victims with the errors to add to their gradients, and what was fitted to the proxies.

    Attributes:
        errors: kind -> errors, [V, d_out, d_in] per layer, before they are scaled.
        decoded: decoder -> the victims' gradients as it decodes them; `class_mean_gradient` too.
        strangers: PSNR in dB [V] of the amortised estimate from another image of the label.
    """

    target: Target
    a: dict[str, Tensor]
    victims: Observed
    public: ImageSet
    errors: dict[str, Gradient]
    decoded: dict[str, Gradient]
    inverter: AmortisedInverter
    strangers: Tensor

    @property
    def images(self) -> Tensor:
        return self.victims.images[:, 0]

    @property
    def labels(self) -> Tensor:
        return self.victims.labels[:, 0]


@lru_cache(maxsize=1)
def scene_of(world: World, seed: int) -> Scene:
    """Victims, decoders and errors of one seed."""
    base, data = base_of(world.base, world.device), world.data[0]
    count, pairs_count = (QUICK_VICTIMS, QUICK_PAIRS) if world.quick else (VICTIMS, PAIRS)
    target = target_of(base)
    a = start_of(target, seed)
    private, strangers, fitted = images_of_seed(base, data, seed, count, pairs_count)
    victims, others = (victims_of(target, a, images) for images in (private, strangers))
    pairs = GeneratedPairs(target, a, fitted)
    decoders = {kind: KINDS[kind]() for kind in DECODERS}
    estimates, classes = Estimates(), ClassMean()
    fit_together(pairs, len(fitted), [*decoders.values(), estimates, classes])
    both = {name: torch.cat([update, others.updates[name]]) for name, update in victims.updates.items()}
    all_decoded = {kind: decoder.decode(both) for kind, decoder in decoders.items()}
    decoded = {kind: Gradient({n: g[:count] for n, g in each.dense.items()}) for kind, each in all_decoded.items()}
    generator = torch.Generator().manual_seed(seed)
    errors = {
        "isotropic": isotropic(victims.gradient, generator),
        "subspace": within_proxies(pairs, count, generator),
        "decoder": Gradient({n: g[count:] - others.gradient.dense[n] for n, g in all_decoded["ridge"].dense.items()}),
    }
    controls = psnr_db(estimates.inverter.invert(others.updates).images, victims.images[:, 0])
    guesses = decoded | {classes.kind: classes.guess(victims.labels)}
    return Scene(target, a, victims, fitted, errors, guesses, estimates.inverter, controls)


def isotropic(like: Gradient, generator: torch.Generator) -> Gradient:
    """White noise of the gradients' shapes."""
    return Gradient({name: torch.randn(g.shape, generator=generator).to(g) for name, g in like.dense.items()})


def within_proxies(pairs: GeneratedPairs, count: int, generator: torch.Generator) -> Gradient:
    """`count` errors with the covariance of the proxies' gradients: random sums of their differences from the mean.

    Each gradient is divided by the norm of its update. The weights of a sum are the same in all layers, because one
    image determines the gradients of all layers.
    """
    total = len(pairs)
    draws = torch.randn(count, total, generator=generator)
    draws = (draws - draws.mean(1, keepdim=True)).to(pairs.target.base.device)
    return add_up(
        pairs,
        total,
        lambda batch, rows: {n: draws[:, rows] / u.flatten(1).norm(dim=1) for n, u in batch.updates.items()},
    )


def disturbed(true: Gradient, errors: Gradient, one_minus_cosine: float) -> Gradient:
    """Float64 gradients G + tan(angle) |G| e whose cosine with the true ones is as wanted, in every layer.

    Args:
        errors: [V, d_out, d_in] per layer; e is their component orthogonal to G, scaled to unit norm.
    """
    found = {}
    slope = (one_minus_cosine * (2 - one_minus_cosine)) ** 0.5 / (1 - one_minus_cosine)
    for name, dense in true.dense.items():
        gradient, error = dense.double().flatten(1), errors.dense[name].double().flatten(1)
        unit = gradient / gradient.norm(dim=1, keepdim=True)
        for _ in range(2):  # the second projection removes the rounding error of the first
            error = error - (error * unit).sum(1, keepdim=True) * unit
        size = gradient.norm(dim=1) / error.norm(dim=1) * slope
        found[name] = (gradient + size[:, None] * error).view_as(dense)
    return Gradient(found)


class Cosine(Study):
    """Study `cosine`: PSNR by route after errors of a known cosine and kind are added to exact gradients."""

    name = "cosine"
    question = "What cosine between decoded and true gradient does inversion need?"
    method = (
        f"Errors of a known cosine are added to the exact gradients of {VICTIMS} victims a seed, in every layer: "
        "`isotropic` ones are white noise, `subspace` ones random sums of differences of proxy gradients, `decoder` "
        "ones the errors of the ridge decoder on held-out proxies of the victims' labels. Each is made orthogonal to "
        "the gradient and scaled. The closed form reads the gradient of the first attention layer, alone or with "
        f"{PUBLIC_IMAGES} public images as prior; the amortised route ({PAIRS} pairs) the update s G A^T of the "
        f"disturbed gradients; matching searches from gray with the true label ({MATCHED_VICTIMS} victims a seed); "
        f"Gauss-Newton takes at most {PASSES} passes from {START_DB:.0f} dB (the original and noise in the span of "
        f"{PUBLIC_IMAGES} public images, so no attack; 1 victim of each of {SEARCHED_SEEDS} seeds). `nines` are "
        "-log10(1 - cos): those of every decoder on the victims themselves (cosines averaged over layers), and those "
        "at which the closed form just gives a PSNR, found by bisection for every victim. Controls: the class-mean "
        "gradient among decoders; the mean image, and the amortised estimate from another image of the label, beside "
        "PSNR."
    )
    no_controls = "The nearest proxy and noise adapters are left to the audit, which has them for every adapter."
    panels = (
        *(
            Panel(
                "psnr_db",
                "one_minus_cosine",
                ("route",),
                {"error": kind},
                f"Errors: {kind}",
                "1 - cos",
                "PSNR (dB)",
                x_log=True,
            )
            for kind in ERRORS
        ),
        Panel(
            "nines",
            "of",
            ("error",),
            title="Where decoders lie, and what is needed",
            x_label="decoder, or level of the closed form",
            y_label="nines: -log10(1 - cos)",
        ),
    )

    def settings(self, world: World) -> list[Setting]:
        kinds, steps = (ERRORS[:1], STEPS[::5]) if world.quick else (ERRORS, STEPS)
        levels = LEVELS_DB[-1:] if world.quick else LEVELS_DB
        disturbances: list[Setting] = [{"error": kind, "one_minus_cosine": step} for kind in kinds for step in steps]
        crossings: list[Setting] = [{"error": kind, "level_db": level} for kind in kinds for level in levels]
        return [{"error": "as decoded"}, *disturbances, *crossings]

    def measure(self, world: World, setting: Setting, seed: int) -> list[Measured]:
        scene = scene_of(world, seed)
        if setting["error"] == "as decoded":
            return decoders_of(scene)
        errors = scene.errors[str(setting["error"])]
        if "level_db" in setting:
            return nines_needed(scene, errors, float(setting["level_db"]))
        step = float(setting["one_minus_cosine"])
        gradient = disturbed(scene.victims.gradient, errors, step)
        images = scene.images
        update = {layer.name: _update(scene, layer.name, gradient, layer.scale) for layer in scene.target.layers}
        found = {"amortised": scene.inverter.invert(update).images, **closed_forms(scene, gradient)}
        if step in MATCHED.get(str(setting["error"]), ()) and not world.quick:
            found["matching"] = matched(scene, gradient)
        if step in SEARCHED.get(str(setting["error"]), ()) and seed < SEARCHED_SEEDS and not world.quick:
            found[SEARCH] = searched(scene, update, seed)
        rows = {route: psnr_db(each, images[: len(each)]) for route, each in found.items()}
        rows |= {"mean_image": mean_image_db(scene.public, images), "stranger": scene.strangers}
        return [Measured("psnr_db", each.tolist(), {"route": route}) for route, each in rows.items()]

    def conclude(self, world: World, table: Table) -> list[str]:
        return [*_decoders_against_need(table), *_routes(table)]


def _update(scene: Scene, name: str, gradient: Gradient, scale: float) -> Tensor:
    """s G A^T of one layer [V, d_out, r], float32, as a victim's step shows it."""
    return (scale * gradient.dense[name] @ scene.a[name].double().mT).float()


def closed_forms(scene: Scene, gradient: Gradient) -> dict[str, Tensor]:
    """Images of the closed form, alone and with public images as prior; none where its count refuses the base."""
    base = scene.target.base
    if not count_attention_rowspace(base).identifiable:
        return {}
    public = scene.public.batch(slice(0, PUBLIC_IMAGES), base.device)
    return {
        "attention_rowspace": closed_form(base, gradient),
        PUBLIC: closed_form(base, gradient, public),
    }


def nines_needed(scene: Scene, errors: Gradient, level_db: float) -> list[Measured]:
    """-log10(1 - cos) at which the closed form of each victim reaches the level: between 0 and 16, by bisection."""
    if not count_attention_rowspace(scene.target.base).identifiable:
        return []
    true = Gradient({FIRST_QKV: scene.victims.gradient.dense[FIRST_QKV]})
    low, high = torch.zeros(len(scene.images)), torch.full((len(scene.images),), 16.0)
    for _ in range(10):
        middle = (low + high) / 2
        for victim, nines in enumerate(middle.tolist()):
            one, error = (Gradient({FIRST_QKV: g.dense[FIRST_QKV][victim, None]}) for g in (true, errors))
            image = closed_form(scene.target.base, disturbed(one, error, 10.0**-nines))
            reached = bool(psnr_db(image, scene.images[victim, None]) >= level_db)
            (high if reached else low)[victim] = nines
    return [Measured("nines", high.tolist(), {"of": f"closed form, {level_db:.0f} dB"})]


def decoders_of(scene: Scene) -> list[Measured]:
    """Cosine and nines of every decoder on the victims, and the PSNR of the closed form on what it decodes."""
    measured = [Measured("psnr_db", mean_image_db(scene.public, scene.images).tolist(), {"route": "mean_image"})]
    for kind, decoded in scene.decoded.items():
        cosine = mean_cosine(decoded, scene.victims.gradient)
        nines = -(1 - cosine.double()).clamp_min(1e-16).log10()
        measured.append(Measured("cosine", cosine.tolist(), {"decoder": kind}))
        measured.append(Measured("nines", nines.tolist(), {"of": kind}))
        for route, images in closed_forms(scene, decoded).items():
            labels: Setting = {"route": route, "decoder": kind}
            measured.append(Measured("psnr_db", psnr_db(images, scene.images).tolist(), labels))
    return measured


def matched(scene: Scene, gradient: Gradient) -> Tensor:
    """Images of the first victims by matching from gray, with their true labels."""
    some = slice(0, MATCHED_VICTIMS)
    observed = GradientObjective(Gradient({name: g[some].float() for name, g in gradient.dense.items()}))
    start, labels = torch.full_like(scene.images[some], 0.5), scene.labels[some]
    return match(scene.target, observed, start, labels, MatchingConfig(), "matching", "").images


def searched(scene: Scene, update: dict[str, Tensor], seed: int) -> Tensor:
    """The image that Gauss-Newton finds for the first victim, started at the original plus noise of START_DB."""
    generator = torch.Generator().manual_seed(seed)
    device = scene.target.base.device
    subspace = Subspace.of(scene.public.batch(slice(0, PUBLIC_IMAGES), device))
    original = scene.images[0].flatten()
    noise = subspace.basis @ torch.randn(subspace.basis.shape[1], generator=generator).to(device)
    start = (original + noise * 10 ** (-START_DB / 20) / noise.square().mean().sqrt()).clamp(0, 1)
    config = GaussNewtonConfig(passes=PASSES, patience=PASSES, seed=seed)
    updates = UpdateMap(scene.target, scene.a, scene.images.shape[1:], config.directions)
    observed = flat_units({layer.name: update[layer.name][:1] for layer in scene.target.layers})[0]
    return search(updates, observed, start, scene.labels[:1], subspace, config).image.view_as(scene.images[:1])


def _decoders_against_need(table: Table) -> list[str]:
    """How far the best decoder is from the cosine that the closed form needs, and that cosine by kind of error."""
    sentences = []
    decoders = [row for row in table.where("nines") if row.keys["error"] == "as decoded"]
    needs = [row for row in table.where("nines") if "level_db" in row.keys]
    best = max(decoders, key=lambda row: row.mean, default=None)
    least = min(needs, key=lambda row: row.mean, default=None)
    if best is not None and least is not None:
        lies = f"the best decoder, {best.keys['of']}, has {best.words(2)} nines on the victims (1 - cos about "
        lies += f"{10**-best.mean:.0e})"
        wants = f"{_level(least)} need {least.words(1)} with {least.keys['error']} errors"
        enough = best.mean >= least.mean
        first = f"{'A' if enough else 'No'} decoder is precise enough for the closed form"
        sentences.append(f"{first}: {lies}, and {wants}, the least demanding of the levels and errors measured.")
    for row in needs:
        sentences.append(
            f"The closed form reaches {_level(row)} with {row.keys['error']} errors at {row.words(1)} nines, that is at"
            f" 1 - cos of about {10**-row.mean:.0e}."
        )
    mean = table.one("psnr_db", error="as decoded", route="mean_image")
    for row in table.where("psnr_db", error="as decoded", route="attention_rowspace"):
        if mean is not None:
            sentences.append(
                f"On what {row.keys['decoder']} decodes, the closed form gives {row.words()} dB, against "
                f"{mean.mean:.1f} dB of the mean image."
            )
    return sentences


def _routes(table: Table) -> list[str]:
    """Each other route at its largest and smallest error, beside the mean image."""
    sentences = []
    for kind in ERRORS:
        for route in ("amortised", "matching", SEARCH):
            rows = sorted(table.where("psnr_db", error=kind, route=route), key=_step)
            if len(rows) > 1:
                least, most = rows[0], rows[-1]
                mean = table.one(
                    "psnr_db", error=kind, route="mean_image", one_minus_cosine=most.keys["one_minus_cosine"]
                )
                beside = "" if mean is None else f"; the mean image has {mean.mean:.1f} dB"
                sentences.append(
                    f"{route} with {kind} errors: {least.words()} dB at 1 - cos = {_step(least):g}, {most.words()} dB "
                    f"at {_step(most):g}{beside}."
                )
    return sentences


def _step(row: Row) -> float:
    return float(row.keys["one_minus_cosine"])


def _level(row: Row) -> str:
    return f"{float(row.keys['level_db']):.0f} dB"

"""Study `prior`: what total variation or a diffusion model add to gradient matching, and what they make alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from r2f_ext.audit.metrics import psnr_db, ssim
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet
from r2f_ext.decoders import Ridge, Updates
from r2f_ext.inversion.channels import without_foreign_colours
from r2f_ext.inversion.matching import OPTIMIZERS, SCHEDULES, MatchingConfig, Prior, match
from r2f_ext.inversion.objectives import GradientObjective, Objective, UpdateObjective
from r2f_ext.inversion.prior import ScoreDistillation
from r2f_ext.inversion.prior_training import train_prior
from r2f_ext.ops.reference import total_variation_backward
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.studies.scene import (
    Estimates,
    base_of,
    fit_together,
    mean_image_db,
    private_images,
    public_images,
    start_of,
    stranger_rows,
    target_of,
    victims_of,
)
from r2f_ext.studies.study import Data, Measured, Panel, Setting, Study, World
from r2f_ext.studies.table import Row, Table
from r2f_ext.types import Gradient, Target

BATCH, CHANNELS = 32, (16, 24, 32)  # of the diffusion model, small enough to be trained in two minutes on one core
WEIGHT = 1e-3  # of score distillation: its default
COLOUR_IMAGES = 200  # public images that define which colours are possible


@dataclass(frozen=True)
class Sizes:
    """Numbers per seed. The strangers come from `reserve` public images, to which nothing is fitted."""

    victims: int
    pairs: int
    reserve: int
    steps: int
    trained_images: int
    training_steps: int


FULL, QUICK = Sizes(4, 1500, 400, 50, 5000, 250), Sizes(2, 60, 40, 2, 100, 2)
DECODED, UPDATE, NOTHING = "decoded gradient", "LoRA update", "nothing"
GRAY, AMORTISED = "gray", "amortised"
NONE, TV, DIFFUSION = "none", "total variation", "score distillation"
OWN, STRANGER, MEAN = "victim", "stranger", "mean_image"


class PriorStudy(Study):
    """Study `prior`: PSNR of matching with no prior, total variation or a diffusion model, and of priors alone."""

    name = "prior"
    question = "What do total variation and a diffusion model add to gradient matching, and what do they make alone?"
    method = (
        f"{FULL.victims} victims a seed (r = 8, one image, one step of SGD) of the first data set; ridge decoder and "
        f"amortised estimate from {FULL.pairs} pairs. Matching of the decoded gradient, or of the LoRA update itself, "
        f"from gray or from the amortised estimate: {FULL.steps} steps, otherwise the library's settings of `matching` "
        "(from gray) and of `amortised_refined` (from the estimate; colours that no public image has are taken out). "
        "One prior at a time: none, total variation with "
        f"these settings' weight, or score distillation with weight {WEIGHT:g} from a small diffusion model, trained "
        f"for {FULL.training_steps} steps of {BATCH} out of at most {FULL.trained_images} public images "
        "(diffusion_loss: its mean squared error, about 1 before training; benchmarks/inversion/prior.py trains a "
        "larger one for longer). Where nothing is observed, the same optimizer and steps follow the prior's slope "
        "alone; without a prior the start itself is scored. The stranger's row is what the same search makes of the "
        "update of a public image of the same label, to which neither decoder nor estimate nor diffusion model was "
        "fitted, scored against the victim's image."
    )
    no_controls = "No cosine is reported, so there is no class-mean gradient."
    panels = (
        Panel("psnr_db", "prior", ("observed", "start"), {"route": OWN}, "Victims"),
        Panel("ssim", "prior", ("observed", "start"), {"route": OWN}, "Victims", y_label="SSIM"),
        Panel(
            "psnr_db",
            "prior",
            ("route",),
            {"observed": UPDATE, "start": AMORTISED, "route": (OWN, STRANGER, MEAN)},
            "Matching of updates from amortised, and its controls",
        ),
    )
    seeds = 2

    def settings(self, world: World) -> list[Setting]:
        priors = (NONE, TV, DIFFUSION) if find_spec("diffusers") else (NONE, TV)
        return [
            {"observed": observed, "start": start, "prior": prior}
            for start in ((AMORTISED,) if world.quick else (GRAY, AMORTISED))
            for observed in (NOTHING, DECODED, UPDATE)
            for prior in priors
            if (observed, start, prior) != (NOTHING, GRAY, TV)  # the total variation of gray is 0 already
        ]

    def measure(self, world: World, setting: Setting, seed: int) -> list[Measured]:
        scene, audit = _scene(world, world.data[0], seed), AuditConfig()
        from_gray = setting["start"] == GRAY
        start = torch.full_like(scene.start, 0.5) if from_gray else scene.start
        config = replace(audit.matching if from_gray else audit.refinement, steps=world.of(FULL, QUICK).steps)
        slope: Prior | None = None
        found: list[Measured] = []
        if setting["prior"] == DIFFUSION:
            unet, scheduler, loss = _diffusion(world, world.data[0], seed)
            slope = ScoreDistillation(unet, scheduler, WEIGHT, seed).gradient
            found.append(Measured("diffusion_loss", [loss], {"route": OWN}))
        if setting["observed"] == NOTHING:
            if setting["prior"] == TV:
                slope = _variation(config)
            images = start if slope is None else prior_alone(slope, start, config)
        else:
            config = config if setting["prior"] == TV else replace(config, tv_weight=0.0)
            objective: Objective = GradientObjective(scene.decoded)
            if setting["observed"] == UPDATE:
                objective = UpdateObjective(scene.target, scene.a, scene.updates)
            images = match(scene.target, objective, start, scene.labels, config, "matching", "", prior=slope).images
        if not from_gray:
            images = without_foreign_colours(images, start, scene.public)
        for route, guess in zip((OWN, STRANGER), images.split(len(scene.private)), strict=True):
            found.append(Measured("psnr_db", psnr_db(guess, scene.private).tolist(), {"route": route}))
            found.append(Measured("ssim", ssim(guess, scene.private).tolist(), {"route": route}))
        return [*found, Measured("psnr_db", scene.mean_image_db, {"route": MEAN})]

    def conclude(self, world: World, table: Table) -> list[str]:
        rows = [row for row in table.where("psnr_db", route=OWN) if row.keys["observed"] != NOTHING]
        with_prior = [row for row in rows if row.keys["prior"] != NONE]
        gains = _changes(with_prior, table, prior=NONE)
        found = [
            _listed("No gain over matching without a prior", gains, lambda change: not change.positive),
            _listed("A gain over matching without a prior", gains, lambda change: change.positive),
            _listed(
                "No gain of matching with a prior over that prior alone",
                _changes(with_prior, table, observed=NOTHING),
                lambda change: not change.positive,
            ),
        ]
        moved = _changes(rows, table, observed=NOTHING, prior=NONE)
        similarities = [row for row in table.where("ssim", route=OWN) if row.keys["observed"] != NOTHING]
        found += [
            _listed("No better than their start", moved, lambda change: not change.positive),
            _listed("Better than their start", moved, lambda change: change.positive),
            _listed(
                "Worse than their start by SSIM",
                _changes(similarities, table, observed=NOTHING, prior=NONE),
                lambda change: change.high is not None and change.high < 0,
                "",
            ),
        ]
        strangers = _changes(rows, table, route=STRANGER)
        nothing = "Nothing recovered, no better than what the same search makes of a stranger's update"
        found.append(_listed(nothing, strangers, lambda change: not change.positive))
        if strangers and not found[-1]:
            found.append("Every search is above the same search for a stranger of the same label.")
        if rows and (mean := table.one("psnr_db", route=MEAN)):
            best = max(rows, key=lambda row: row.mean)
            found.append(f"Best: {_name(best)}, {best.words()} dB; the mean image of the proxies {mean.words()} dB.")
        if rows and not table.where("psnr_db", prior=DIFFUSION):
            found.append("Score distillation is left out: it needs diffusers, pip install 'r2f-ext[prior]'.")
        return [sentence for sentence in found if sentence]


@dataclass(frozen=True)
class Scene:
    """What was observed of V victims and then of their V strangers, and where the searches start."""

    target: Target
    a: dict[str, Tensor]
    updates: Updates
    decoded: Gradient
    start: Tensor  # [2 V, c, h, w]
    labels: Tensor  # [2 V], as the amortised route finds them
    private: Tensor  # [V, c, h, w]
    public: Tensor  # [n, c, h, w], some public images
    mean_image_db: list[float]


@lru_cache(maxsize=1)
def _scene(world: World, data: Data, seed: int) -> Scene:
    base = base_of(world.base, world.device)
    target, sizes = target_of(base), world.of(FULL, QUICK)
    a = start_of(target, seed)
    fitted, reserve = _public(world, data, seed)
    private = private_images(base, data, seed, sizes.victims)
    observed = victims_of(target, a, private)
    strangers = victims_of(target, a, reserve.take(stranger_rows(reserve, private.labels, seed)))
    updates = {name: torch.cat([u, strangers.updates[name]]) for name, u in observed.updates.items()}
    decoder, estimates = Ridge(), Estimates()
    fit_together(GeneratedPairs(target, a, fitted), sizes.pairs, (decoder, estimates))
    start = estimates.inverter.invert(updates)
    assert start.labels is not None
    images = observed.images[:, 0]
    public, floor = fitted.batch(slice(COLOUR_IMAGES)), mean_image_db(fitted, images).tolist()
    return Scene(target, a, updates, decoder.decode(updates), start.images, start.labels, images, public, floor)


@lru_cache(maxsize=1)
def _diffusion(world: World, data: Data, seed: int) -> tuple[Any, Any, float]:
    """A UNet, its scheduler and the mean of its last losses; trained on the decoder's public images and others."""
    fitted, _ = _public(world, data, seed)
    steps = world.of(FULL, QUICK).training_steps
    unet, scheduler, losses = train_prior(fitted, steps, seed=seed, batch=BATCH, channels=CHANNELS)
    last = losses[-steps // 10 :]
    return unet.to(world.device), scheduler, sum(last) / len(last)


def _public(world: World, data: Data, seed: int) -> tuple[ImageSet, ImageSet]:
    """Public images to fit to, and the reserve, from which strangers are taken.

    Raises:
        R2FError: there are too few.
    """
    base, sizes = base_of(world.base, world.device), world.of(FULL, QUICK)
    count, least = sizes.trained_images + sizes.reserve, sizes.pairs + sizes.reserve
    images = public_images(base, data, seed, count, least)
    rows = torch.arange(len(images))
    return images.take(rows[: -sizes.reserve]), images.take(rows[-sizes.reserve :])


def _variation(config: MatchingConfig) -> Prior:
    """The slope of total variation, weighted as in matching."""

    def slope(images: Tensor, step: int) -> Tensor:
        return total_variation_backward(images.new_full((len(images),), config.tv_weight), images, config.isotropic)

    return slope


def prior_alone(slope: Prior, start: Tensor, config: MatchingConfig) -> Tensor:
    """The search of `match` with the prior's gradient alone: the images [V, c, h, w] after all its steps."""
    images = start.clone()
    optimizer = OPTIMIZERS[config.optimizer](images, config.box)
    for step in range(config.steps):
        size = config.step_size * SCHEDULES[config.schedule](step, config.steps)
        optimizer.step(images, images.new_zeros(len(images)), slope(images, step), size, step + 1)
    return images


def _changes(rows: Sequence[Row], table: Table, **other: str) -> list[Row]:
    """Each row minus the row with these other keys, victim by victim; rows without such a row are left out."""
    return [change for row in rows if (change := table.change(row, **other)) is not None]


def _listed(words: str, changes: Sequence[Row], chosen: Callable[[Row], bool], unit: str = " dB") -> str:
    """A sentence that lists the chosen differences; "" where there are none."""
    told = [
        f"{_name(change)}, {change.words(3 if change.metric == 'ssim' else 2)}{unit}"
        for change in changes
        if chosen(change)
    ]
    return f"{words}: {'; '.join(told)}." if told else ""


def _name(row: Row) -> str:
    keys = row.keys
    prior = "no prior" if keys["prior"] == NONE else keys["prior"]
    return f"{keys['observed']} from {keys['start']} with {prior}"

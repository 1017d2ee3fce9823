"""Study `phase0`: what the exact gradient of one image gives away, on the small base and at 224x224."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.inversion.exact_gradients import exact_gradients
from r2f_ext.inversion.matching import MatchingConfig, match
from r2f_ext.inversion.objectives import GradientObjective
from r2f_ext.inversion.route import Problem
from r2f_ext.inversion.routes import registry, run_routes, verdicts_of
from r2f_ext.inversion.update_map import MAX_PIXELS
from r2f_ext.studies.scene import (
    base_of,
    exact_gradients_of,
    mean_image_db,
    private_images,
    public_images,
    stranger_rows,
    target_of,
)
from r2f_ext.studies.study import Measured, Panel, Setting, Study, World
from r2f_ext.studies.table import Row, Table
from r2f_ext.types import BaseModel

# Random weights need no download. B/16 is the most common ViT. L/16 is the smallest ViT of timm at 224 in which the row
# space of attention determines the image (`r2f identifiability`).
LARGE: Mapping[str, int] = {"timm-random:vit_base_patch16_224": 2, "timm-random:vit_large_patch16_224": 1}
IMAGES, QUICK_IMAGES, PUBLIC, MATCHED = 8, 2, 100, 2
EXACT_DB = 40.0


class Phase0(Study):
    """Study `phase0`: PSNR of every route that reads exact gradients, by base and private set."""

    name = "phase0"
    question = "Does the exact gradient give the image?"
    method = (
        f"Exact float32 gradients of {IMAGES} single images a seed on the base, and of {max(LARGE.values())} and "
        f"{min(LARGE.values())} on 224x224 ViTs with random weights (B/16, L/16); all three private sets. Every route "
        "of the registry that reads gradients runs where its count allows it: `unknowns` and `equations` of one linear "
        f"system. Matching of the gradients of all linear layers from gray, with true labels, takes {MATCHED} images a "
        f"seed, on bases whose images have at most {MAX_PIXELS} numbers. `worst_db` is the smallest PSNR of a seed, "
        "`seconds` the time of one image without its gradient, `gradient_seconds` that of the gradient. Controls: the "
        "mean image of the proxy; `stranger`, a public image of the same label, which the gradient of that image would "
        "give at best."
    )
    no_controls = "No decoder runs here, so that there is no class-mean gradient."
    panels = (
        *(
            Panel("psnr_db", "base", ("data",), {"route": route}, route)
            for route in ("patch_position", "attention_rowspace")
        ),
        Panel(
            "psnr_db",
            "base",
            ("route", "data"),
            {"route": ("matching", "mean_image", "stranger")},
            "Matching from gray, and controls",
        ),
        Panel("seconds", "base", ("route", "data"), title="Seconds an image", y_log=True),
    )

    def settings(self, world: World) -> list[Setting]:
        bases = [world.base] if world.quick else list(dict.fromkeys([world.base, *LARGE]))
        return [{"base": base, "data": data.name} for base in bases for data in world.data]

    def measure(self, world: World, setting: Setting, seed: int) -> list[Measured]:
        spec, data = str(setting["base"]), world.named(str(setting["data"]))
        base = base_of(spec, world.device)
        count = LARGE.get(spec, QUICK_IMAGES if world.quick else IMAGES)
        private, public = private_images(base, data, seed, count), public_images(base, data, seed, PUBLIC)
        originals, labels = private.batch(slice(None), base.device), private.labels.to(base.device)
        verdicts = verdicts_of(Problem(base))
        names = [name for name, route in registry().items() if "gradients" in route.reads]
        measured = []
        for name in names:
            for metric in ("unknowns", "equations"):
                measured.append(Measured(metric, [getattr(verdicts[name], metric)], {"route": name}))
        began = time.perf_counter()
        gradients = exact_gradients(base, originals, labels)
        measured.append(Measured("gradient_seconds", [(time.perf_counter() - began) / count]))
        found = run_routes(Problem(base, gradients=gradients), verdicts, names).reconstructions
        images = {each.route: each.images for each in found}
        seconds = {each.route: each.seconds / count for each in found}
        if prod(base.input_shape) <= MAX_PIXELS and not world.quick:
            images["matching"], seconds["matching"] = matched(base, originals[:MATCHED], labels[:MATCHED])
        for route, each in images.items():
            psnr = psnr_db(each, originals[: len(each)])
            measured.append(Measured("psnr_db", psnr.tolist(), {"route": route}))
            measured.append(Measured("worst_db", [float(psnr.min())], {"route": route}))
            measured.append(Measured("seconds", [seconds[route]], {"route": route}))
        strangers = public.batch(stranger_rows(public, private.labels, seed), base.device)
        for control, psnr in (
            ("mean_image", mean_image_db(public, originals)),
            ("stranger", psnr_db(strangers, originals)),
        ):
            measured.append(Measured("psnr_db", psnr.tolist(), {"route": control}))
        return measured

    def conclude(self, world: World, table: Table) -> list[str]:
        return [*_refused(table), *_recovered(table)]


def matched(base: BaseModel, originals: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Images by matching of exact gradients from gray, and seconds an image."""
    target = target_of(base)
    objective = GradientObjective(exact_gradients_of(target, originals[:, None], labels[:, None]))
    start = torch.full_like(originals, 0.5)
    found = match(target, objective, start, labels, MatchingConfig(), "matching", "")
    return found.images, found.seconds / len(originals)


def _refused(table: Table) -> list[str]:
    """Sentences on the routes that a count refuses; the verdict depends on the base alone, not on the images."""
    sentences = []
    for row in _of_first_data(table.where("unknowns")):
        equations = table.one("equations", **row.keys)
        solved = table.one("psnr_db", **row.keys)
        if solved is None and equations is not None:
            sentences.append(
                f"{row.keys['route']} does not run on {row.keys['base']}: {row.mean:.0f} unknowns against "
                f"{equations.mean:.0f} equations."
            )
    return sentences


def _recovered(table: Table) -> list[str]:
    """Every route beside its mean image, matching first."""
    rows = [row for row in table.where("psnr_db") if row.keys["route"] not in ("mean_image", "stranger")]
    sentences = []
    for row in sorted(rows, key=lambda row: row.keys["route"] != "matching"):
        mean, worst = (table.one("psnr_db", **{**row.keys, "route": "mean_image"}), min(row.values))
        seconds = table.one("seconds", **row.keys)
        time_taken = "" if seconds is None else f", {seconds.mean:.2g} s an image"
        beside = "" if mean is None else f"; the mean image has {mean.mean:.1f} dB on this set"
        word = "exact" if worst >= EXACT_DB else "not exact for every image"
        sentences.append(
            f"{row.keys['route']} on {row.keys['base']}, {row.keys['data']}: {row.words()} dB, at worst {worst:.1f}, "
            f"{word} (at least {EXACT_DB:.0f} dB){time_taken}{beside}."
        )
    return sentences


def _of_first_data(rows: list[Row]) -> list[Row]:
    return list({(row.keys["base"], row.keys["route"]): row for row in reversed(rows)}.values())[::-1]

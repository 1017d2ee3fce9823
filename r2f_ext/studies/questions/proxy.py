"""The study `proxy`: how many public images an attacker needs, how similar, and whether generated ones serve."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from r2f_ext.data import ImageSet
from r2f_ext.decoders import Projection, Ridge, RowLMMSE, Updates
from r2f_ext.decoders.kernel import OWN
from r2f_ext.decoders.ridge import RIDGE
from r2f_ext.pairs import GeneratedPairs, updates_of
from r2f_ext.studies import scene
from r2f_ext.studies.scene import Observed
from r2f_ext.studies.shift import (
    GENERATED,
    a_distance,
    cosines_of,
    lost_to_controls,
    public_of,
    reconstructions,
    split_of,
)
from r2f_ext.studies.study import Measured, Panel, Setting, Study, World
from r2f_ext.studies.table import Row, Table, Value
from r2f_ext.types import BaseModel, Target

VICTIMS, QUICK_VICTIMS = 24, 4  # per seed and private set
COUNTS, MOST = (100, 300, 1000), 3000
QUICK_COUNTS = (30, 60)
INVERTED, HALF, MIXED = " inverted", " of half the labels", f" and {GENERATED}"


class Proxy(Study):
    """Study `proxy`: accuracy of decoders and PSNR of routes, by kind and number of the public images."""

    name = "proxy"
    question = "How many public images does an attacker need, how similar, and do generated ones serve?"
    method = (
        f"Decoders and the amortised route are fitted on {', '.join(map(str, COUNTS))} pairs of one kind of public "
        f"images, and without the decoder ridge on {MOST}, and scored on {VICTIMS} victims of every private set and "
        "seed (r = 8, one step of SGD on one image). Public faces are other private faces, mirrored and shifted, a "
        f"few dozen people however many pairs. Variants of the first set's kind, {COUNTS[-1]} pairs of each: with "
        "inverted pixels; images of the first half of the labels only, scored on victims of the other half; every "
        "second image procedural. `distance` is the proxy A-distance, 0 to 2, of public and victims' updates (see the "
        "study `transfer`). Ridge has one setting, so that counts differ in nothing else. Where labels are random the "
        "amortised route has a label's share of the pairs, or all pairs under their own labels where it is small."
    )
    no_controls = "Noise adapters are left to the audit, and the exact-gradient ceiling to the study `phase0`."
    seeds = 2
    panels = (
        Panel("cosine", "pairs", ("proxy",), {"first": True, "decoder": "ridge"},
              "First private set: cosine of ridge on victims", x_log=True),
        Panel("psnr_db", "pairs", ("proxy",), {"first": True, "route": "amortised"},
              "First private set: amortised reconstruction", x_log=True),
        Panel("cosine", "proxy", ("private",), {"decoder": "ridge", "pairs": (COUNTS[-1], QUICK_COUNTS[-1])},
              "Kinds of public images, equally many: ridge"),
        Panel("psnr_db", "proxy", ("private",), {"route": "amortised", "pairs": (COUNTS[-1], QUICK_COUNTS[-1])},
              "Kinds of public images, equally many: amortised"),
    )  # fmt: skip

    def settings(self, world: World) -> list[Setting]:
        first = world.data[0].name
        kinds = dict.fromkeys([*(data.name for data in world.data), GENERATED])
        cells = [(kind, count) for kind in kinds for count in COUNTS]
        cells += [(kind, MOST) for kind in dict.fromkeys((first, GENERATED))]
        cells += [(first + variant, COUNTS[-1]) for variant in (INVERTED, HALF, MIXED)]
        if world.quick:
            cells = [(kind, count) for kind in (first, GENERATED) for count in QUICK_COUNTS]
        return [{"proxy": kind, "pairs": count} for kind, count in cells]

    def measure(self, world: World, setting: Setting, seed: int) -> list[Measured]:
        kind, count = str(setting["proxy"]), int(setting["pairs"])
        sets = _attacked(world, seed)
        target, a = sets[0].target, sets[0].a
        public = proxies_of(world, target.base, kind, seed, count)
        decoders = [Projection(), RowLMMSE(), *([Ridge(RIDGE, OWN)] if count < MOST else [])]
        classes, estimates = scene.ClassMean(), scene.Estimates()
        scene.fit_together(GeneratedPairs(target, a, public), len(public), [*decoders, classes, estimates])
        cosines = {each.kind: cosines_of(each, [one.observed for one in sets]) for each in decoders}
        found = []
        for number, each in enumerate(sets):
            observed = each.observed
            own = {decoder: parts[number] for decoder, parts in cosines.items()}
            own[classes.kind] = scene.mean_cosine(classes.guess(observed.labels), observed.gradient)
            figures = [Measured("cosine", values.tolist(), {"decoder": name}) for name, values in own.items()]
            figures += reconstructions(estimates.inverter, observed, each.others, each.kind, public, seed)
            labels: Setting = {"private": each.name, "first": number == 0}
            scored = list(range(len(observed.labels)))
            if kind.endswith(HALF):
                scored = torch.nonzero(observed.labels[:, 0] >= target.base.num_classes // 2).flatten().tolist()
            for one in figures:
                found.append(Measured(one.metric, [one.values[i] for i in scored], {**one.labels, **labels}))
            near = {name: torch.cat([u, each.others[name]]) for name, u in observed.updates.items()}
            distance = a_distance(estimates.inverter.units, near)
            found.append(Measured("distance", [distance], labels))
        return [one for one in found if one.values]

    def conclude(self, world: World, table: Table) -> list[str]:
        said = []
        for private in (data.name for data in world.data):
            said += _on_controls(table, private) + _on_kinds(table, private) + _on_counts(table, private)
        return said


@dataclass(frozen=True)
class Attacked:
    """The victims of one private set, and other images of its kind with their updates."""

    name: str
    target: Target
    a: dict[str, Tensor]
    observed: Observed
    kind: ImageSet
    others: Updates


@lru_cache(maxsize=1)
def _attacked(world: World, seed: int) -> list[Attacked]:
    base = scene.base_of(world.base, world.device, world.quick)
    target = scene.target_of(base)
    a = scene.start_of(target, seed)
    found = []
    for data in world.data[: 1 if world.quick else None]:
        split = split_of(base, data, seed, world.of(VICTIMS, QUICK_VICTIMS))
        others = updates_of(GeneratedPairs(target, a, split.others))
        observed = scene.victims_of(target, a, split.victims)
        found.append(Attacked(data.name, target, a, observed, split.others, others))
    return found


def proxies_of(world: World, base: BaseModel, kind: str, seed: int, count: int) -> ImageSet:
    """Public images of a kind or of a variant of one."""
    victims = world.of(VICTIMS, QUICK_VICTIMS)
    if kind.endswith(INVERTED):
        plain = public_of(world, base, kind.removesuffix(INVERTED), seed, count, victims)
        return replace(plain, images=255 - plain.images)
    if kind.endswith(HALF):
        plain = public_of(world, base, kind.removesuffix(HALF), seed, 3 * count, victims)
        return plain.take(torch.nonzero(plain.labels < base.num_classes // 2).flatten()[:count])
    if kind.endswith(MIXED):
        parts = [public_of(world, base, each, seed, count, victims) for each in (kind.removesuffix(MIXED), GENERATED)]
        return alternating(*parts).take(torch.arange(count))
    return public_of(world, base, kind, seed, count, victims)


def alternating(first: ImageSet, second: ImageSet) -> ImageSet:
    """Images of two sets in turns."""
    images, labels = (
        torch.stack(parts, 1).flatten(0, 1) for parts in ((first.images, second.images), (first.labels, second.labels))
    )
    return ImageSet(f"{first.name}+{second.name}", images, labels)


def _on_controls(table: Table, private: str) -> list[str]:
    rows = table.where("psnr_db", private=private, route="amortised")
    cells = {f"{row.keys['pairs']} of {row.keys['proxy']}": {**_keys(row), "private": private} for row in rows}
    lost = lost_to_controls(table, cells)
    return [f"Victims of {private}: not shown to beat its control is {lost}."] if lost else []


def _on_kinds(table: Table, private: str) -> list[str]:
    """All kinds at the largest number of pairs that ridge is fitted on, best first."""
    rows = table.where("cosine", private=private, decoder="ridge")
    most = max((int(row.keys["pairs"]) for row in rows), default=0)
    parts = []
    for row in sorted((row for row in rows if row.keys["pairs"] == most), key=lambda row: -row.mean):
        image = table.one("psnr_db", private=private, route="amortised", **_keys(row))
        parts.append(f"{row.keys['proxy']} {row.words(3)}" + ("" if image is None else f", {image.mean:.1f} dB"))
    return [f"Victims of {private}, {most} pairs, cosine of ridge and PSNR: {'; '.join(parts)}."] if parts else []


def _on_counts(table: Table, private: str) -> list[str]:
    said = []
    rows = table.where("psnr_db", private=private, route="amortised")
    for kind in dict.fromkeys(row.keys["proxy"] for row in rows):
        own = sorted((row for row in rows if row.keys["proxy"] == kind), key=lambda row: row.keys["pairs"])
        if len(own) > 1:
            few, many = own[0], own[-1]
            said.append(
                f"Victims of {private}, public images {kind}: the amortised route reaches {few.words()} dB with "
                f"{few.keys['pairs']} pairs and {many.words()} dB with {many.keys['pairs']}."
            )
    return said


def _keys(row: Row) -> dict[str, Value]:
    return {name: row.keys[name] for name in ("proxy", "pairs")}

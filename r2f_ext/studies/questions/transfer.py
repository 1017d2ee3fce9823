"""The study `transfer`: decoders fitted on other images or on another model than the victim's, and Eq. 7's bound."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import torch
from scipy.stats import spearmanr
from torch import Tensor

from r2f_ext.data import ImageSet
from r2f_ext.decoders import Decoder, Projection, Ridge, RowLMMSE
from r2f_ext.decoders.kernel import OWN
from r2f_ext.decoders.ridge import RIDGE
from r2f_ext.pairs import GeneratedPairs, updates_of
from r2f_ext.studies import scene
from r2f_ext.studies.bases import BASES
from r2f_ext.studies.pairs_in_memory import PairsInMemory
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

VICTIMS, PAIRS, HELD_OUT = 24, 400, 60  # of a seed
OTHERS = 38  # further public images; on another model they give the target pairs that are no victims
QUICK_VICTIMS, QUICK_PAIRS, QUICK_HELD_OUT = 4, 60, 12
VACUOUS = 1.0  # the loss 1 - cos of a gradient at right angles to the true one


class Transfer(Study):
    """Study `transfer`: losses of decoders on other images or another base, beside the bound of Eq. 7."""

    name = "transfer"
    question = "Does a decoder that was fitted on other images, or on another model, serve the victim (Eq. 7)?"
    method = (
        f"Decoders and the amortised route are fitted on {PAIRS} pairs and scored on {VICTIMS} victims a seed (r = 8, "
        "one step of SGD on one image). `data`: every kind of public images against every private set, on one base; "
        "public faces are faces that are nobody's victims, mirrored and shifted. `model`: pairs of one base against "
        "victims of another of the same architecture, with the same A and the same kind of images. The loss is 1 - "
        f"cos, averaged over layers: `proxy` on {HELD_OUT} held-out pairs, `target` on victims. `distance` is the "
        "proxy A-distance 2(1 - 2 err) of Ben-David et al. (2010), from a linear classifier of the magnitudes of "
        "unit updates, tested on the half that it is not fitted on (`distance_of_entries`: of the updates themselves, "
        "whose signs follow the labels); `lambda` is the sum of both losses of one decoder fitted on the "
        f"proxy's pairs and about {OTHERS} target pairs that are no victims'. `bound` is proxy + distance + lambda. It "
        "stands in for the theorem and is not it: the loss lies in [0, 2], so that distributions of total variation "
        "TV differ in mean loss by at most 2 TV, which is what the distance estimates; but a linear classifier finds "
        "only part of TV, and the joint fit need not be the best decoder there is. A bound of 1 or more says nothing: "
        "so much has a gradient at right angles to the true one."
    )
    no_controls = "Noise adapters are left to the audit, and the exact-gradient ceiling to the study `phase0`."
    panels = (
        Panel("cosine", "to", ("from",), {"moved": "data", "decoder": "ridge"}, "Other images: cosine on victims"),
        Panel("psnr_db", "to", ("from", "route"), {"moved": "data", "route": ("amortised", "stranger")},
              "Other images: amortised reconstruction and stranger"),
        Panel("cosine", "to", ("from",), {"moved": "model", "decoder": "ridge"}, "Other weights: cosine on victims"),
        Panel("loss", "shift", ("term",), {"term": ("target", "bound", "distance"), "decoder": "ridge"},
              "The bound and what it bounds", lines={VACUOUS: "says nothing above"}),
    )  # fmt: skip

    def settings(self, world: World) -> list[Setting]:
        names = [data.name for data in world.data[: 1 if world.quick else None]]
        data = [(proxy, private) for proxy in [*names, GENERATED] for private in names]
        bases = BASES[: 2 if world.quick else None] if world.base in BASES else ()
        models = [(proxy, target) for proxy in bases[: 1 if world.quick else None] for target in bases]
        shifts = [("data", *pair) for pair in data] + [("model", *pair) for pair in models]
        return [{"moved": moved, "from": proxy, "to": target} for moved, proxy, target in shifts]

    def measure(self, world: World, setting: Setting, seed: int) -> list[Measured]:
        moved, proxy, target = (str(setting[name]) for name in ("moved", "from", "to"))
        wanted = tuple(str(s["to"]) for s in self.settings(world) if (s["moved"], s["from"]) == (moved, proxy))
        return _measured(world, moved, proxy, wanted, seed)[target]

    def conclude(self, world: World, table: Table) -> list[str]:
        images, weights = _on_shifts(table, "data", "images"), _on_shifts(table, "model", "weights")
        return [*_on_the_bound(table), *images, *weights]


@dataclass(frozen=True)
class Attacked:
    """Victims, and further images from the same distribution, with the pairs of these images."""

    observed: Observed
    others: ImageSet
    pairs: PairsInMemory


@lru_cache(maxsize=2)
def _measured(world: World, moved: str, source: str, to: tuple[str, ...], seed: int) -> dict[str, list[Measured]]:
    """Fit once and measure every target: target -> figures."""
    sizes = (QUICK_VICTIMS, QUICK_PAIRS, QUICK_HELD_OUT) if world.quick else (VICTIMS, PAIRS, HELD_OUT)
    victims, count, held_out = sizes
    target = scene.target_of(scene.base_of(source if moved == "model" else world.base, world.device, world.quick))
    a = scene.start_of(target, seed)
    kind = world.data[0].name if moved == "model" else source
    public = public_of(world, target.base, kind, seed, count + held_out + OTHERS, victims)
    parts = torch.arange(len(public)).split([count, held_out, len(public) - count - held_out])
    fitted, held_back, rest = (public.take(rows) for rows in parts)
    pairs, held = PairsInMemory.of(GeneratedPairs(target, a, fitted)), scene.victims_of(target, a, held_back)
    decoders = [Projection(), *_bounded()]
    classes, estimates = scene.ClassMean(), scene.Estimates()
    scene.fit_together(pairs, count, [*decoders, classes, estimates])
    attacked = {name: _attacked(world, moved, name, a, seed, victims, rest) for name in to}
    cosines = {each.kind: cosines_of(each, [held, *(one.observed for one in attacked.values())]) for each in decoders}
    found = {}
    for number, (name, each) in enumerate(attacked.items()):
        observed, others = each.observed, updates_of(each.pairs)
        own = {decoder: parts[number + 1] for decoder, parts in cosines.items()}
        own[classes.kind] = scene.mean_cosine(classes.guess(observed.labels), observed.gradient)
        found[name] = [Measured("cosine", values.tolist(), {"decoder": kind}) for kind, values in own.items()]
        found[name] += reconstructions(estimates.inverter, observed, others, each.others, public, seed)
        seen = {layer: torch.cat([update, others[layer]]) for layer, update in observed.updates.items()}
        proxies = updates_of(pairs, 0, count)
        distance, signed = (a_distance(proxies, seen, signed) for signed in (False, True))
        found[name].append(Measured("distance_of_entries", [signed]))
        for joint in _joint(pairs, each.pairs):
            losses = 1 - cosines[joint.kind][0], 1 - own[joint.kind]
            least = sum(float((1 - part).mean()) for part in cosines_of(joint, [held, observed]))
            found[name] += bound_of(losses, distance, least, {"decoder": joint.kind, "shift": f"{source} to {name}"})
    return found


def _attacked(
    world: World, moved: str, name: str, a: dict[str, Tensor], seed: int, victims: int, rest: ImageSet
) -> Attacked:
    if moved == "model":
        target = scene.target_of(scene.base_of(name, world.device, world.quick))
        images, others = scene.private_images(target.base, world.data[0], seed, victims), rest
    else:
        target = scene.target_of(scene.base_of(world.base, world.device, world.quick))
        split = split_of(target.base, world.named(name), seed, victims)
        images, others = split.victims, split.others
    return Attacked(scene.victims_of(target, a, images), others, PairsInMemory.of(GeneratedPairs(target, a, others)))


def _bounded() -> list[Decoder]:
    """Decoders whose bound is measured. Ridge has fixed settings, so that both fits choose from the same functions."""
    return [RowLMMSE(), Ridge(RIDGE, OWN)]


def _joint(pairs: PairsInMemory, others: PairsInMemory) -> list[Decoder]:
    """The same decoders, fitted on the pairs of both distributions."""
    both, joint = pairs + others, _bounded()
    scene.fit_together(both, len(both), joint)
    return joint


def bound_of(losses: tuple[Tensor, Tensor], distance: float, least: float, labels: Setting) -> list[Measured]:
    """The terms of Eq. 7 and their sum.

    Args:
        losses: 1 - cos of held-out proxies [n] and of victims [V]; least: lambda.
    """
    proxy, target = losses
    bound = float(proxy.mean()) + distance + least
    terms = {"proxy": proxy.tolist(), "target": target.tolist(), "distance": [distance], "lambda": [least]}
    terms |= {"bound": [bound], "slack": [bound - float(target.mean())]}
    return [Measured("loss", values, {**labels, "term": term}) for term, values in terms.items()]


def _on_the_bound(table: Table) -> list[str]:
    said = []
    for decoder in ("ridge", "row_lmmse"):
        terms = {
            term: table.where("loss", term=term, decoder=decoder) for term in ("bound", "slack", "target", "distance")
        }
        bounds, slacks = ([row.mean for row in terms[term]] for term in ("bound", "slack"))
        if not bounds:
            continue
        vacuous, broken = sum(each >= VACUOUS for each in bounds), sum(each < 0 for each in slacks)
        said.append(
            f"The bound of {decoder} says nothing (is {VACUOUS:g} or more) in {vacuous} of {len(bounds)} shifts, and "
            f"the measured target loss lies above it in {broken}; bound minus target loss is {min(slacks):.2f} to "
            f"{max(slacks):.2f}, median {median(slacks):.2f}."
        )
        distances, losses = ([row.mean for row in terms[term]] for term in ("distance", "target"))
        if min(len(set(distances)), len(set(losses))) > 2:
            order = float(spearmanr(distances, losses)[0])
            said.append(f"Distance and target loss of {decoder} have rank correlation {order:.2f} over these shifts.")
    return said


def _on_shifts(table: Table, moved: str, what: str) -> list[str]:
    """Sentences on how other images, or other weights, change decoders and reconstructions; lost controls first."""
    rows = table.where("cosine", moved=moved, decoder="ridge")
    if not rows:
        return []
    lost = lost_to_controls(table, {_shift(row): _keys(row) for row in rows})
    said = [f"Other {what}: not shown to beat its control is {lost}."] if lost else []
    for to in dict.fromkeys(row.keys["to"] for row in rows):
        parts = []
        for row in (row for row in rows if row.keys["to"] == to):
            image = table.one("psnr_db", route="amortised", **_keys(row))
            parts.append(
                f"{row.words(2)} from {row.keys['from']}" + ("" if image is None else f" ({image.mean:.1f} dB)")
            )
        said.append(f"Victims of {to}: cosine of ridge (PSNR of the amortised route) {'; '.join(parts)}.")
    return said


def _keys(row: Row) -> dict[str, Value]:
    return {name: row.keys[name] for name in ("moved", "from", "to")}


def _shift(row: Row) -> str:
    return f"{row.keys['from']} to {row.keys['to']}"

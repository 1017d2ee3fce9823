"""Study `layers`: what each adapted layer gives away alone, and what more layers add, from either side."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet
from r2f_ext.decoders import Decoder, Projection, Ridge, Updates
from r2f_ext.decoders.kernel import block_of
from r2f_ext.inversion.route import Problem, Proxies
from r2f_ext.inversion.routes.amortised_refined import AmortisedRefined
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.progress import no_progress
from r2f_ext.studies.pairs_in_memory import PairsInMemory
from r2f_ext.studies.scene import (
    ClassMean,
    Estimates,
    Observed,
    base_of,
    fit_together,
    images_of_seed,
    mean_cosine,
    mean_image_db,
    start_of,
    target_of,
    victims_of,
)
from r2f_ext.studies.study import Measured, Panel, Setting, Study, World
from r2f_ext.studies.table import Table, difference
from r2f_ext.types import Gradient, Reconstruction, Target

VICTIMS, PAIRS = 16, 600
QUICK_VICTIMS, QUICK_PAIRS = 2, 60
TIMED_PAIRS = 100
REFINED_VICTIMS = 4


@dataclass(frozen=True)
class Scene:
    """One seed's victims and strangers, all layers adapted, and the pairs from which each subset of layers is taken."""

    target: Target
    a: dict[str, Tensor]
    victims: Observed
    strangers: Observed
    public: ImageSet
    kept: PairsInMemory


@lru_cache(maxsize=1)
def scene_of(world: World, seed: int) -> Scene:
    """Everything that the settings of one seed share."""
    base, data = base_of(world.base, world.device), world.data[0]
    count, pairs_count = (QUICK_VICTIMS, QUICK_PAIRS) if world.quick else (VICTIMS, PAIRS)
    target = target_of(base)
    a = start_of(target, seed)
    private, strangers, fitted = images_of_seed(base, data, seed, count, pairs_count)
    victims, others = (victims_of(target, a, images) for images in (private, strangers))
    return Scene(target, a, victims, others, fitted, PairsInMemory.of_images(target, fitted))


def blocks_of(target: Target) -> dict[str, list[str]]:
    """Block -> its adapted layers, from the input on."""
    found: dict[str, list[str]] = {}
    for name in target.names:
        found.setdefault(block_of(name), []).append(name)
    return found


def row_cosine(decoded: Gradient, true: Gradient) -> Tensor:
    """|cosine| of the leading right singular vectors of decoded and true gradients, mean over layers, [V].

    Right singular vectors lie in the space of a layer's inputs, which is the side that reveals the image.
    """
    each = [(_leading(decoded.dense[name]) * _leading(dense)).sum(1).abs() for name, dense in true.dense.items()]
    return torch.stack(each).mean(0).float()


def _leading(dense: Tensor) -> Tensor:
    """The leading right singular vector [V, d_in] of [V, d_out, d_in], float64."""
    exact = dense.double()
    return torch.linalg.eigh(exact.mT @ exact).eigenvectors[..., -1]


def effective_rank(matrices: Tensor) -> Tensor:
    """exp(entropy) of the singular values' shares (Roy and Vetterli 2007, Eq. 4), [V]: between 1 and the rank."""
    shares = F.normalize(torch.linalg.svdvals(matrices.double()), p=1, dim=1)
    return torch.special.entr(shares).sum(1).exp()


class Layers(Study):
    """Study `layers`: cosine, PSNR and rank, by the layers seen: one alone, or the first or last blocks."""

    name = "layers"
    question = "Which adapted layers give the image away?"
    method = (
        f"{VICTIMS} victims a seed adapt every linear layer of the blocks (r = 8). Of their updates the attacker sees "
        "one layer alone, the blocks from the input on, or the blocks from the output on; decoders and the amortised "
        f"route are fitted anew on what is seen, with {PAIRS} pairs. `cosine` is of whole gradients, `row_cosine` of "
        "their leading right singular vectors (the side of the layer's inputs), both means over the layers seen. "
        f"Matching in LoRA space from the amortised estimate runs where one block or all are seen ({REFINED_VICTIMS} "
        "victims a seed, true labels). `rank` is numpy's numerical rank of the update (at most r) and of the full "
        "gradient; `effective_rank` the exponential of the entropy of the singular values. `pairs_per_second` times "
        f"the making of {TIMED_PAIRS} pairs (the backward pass stops at the first layer seen), `seconds` fit and "
        "estimate of the amortised route. Controls: the class-mean gradient beside the cosines; the mean image, and "
        "the estimate from another image of the label, beside PSNR."
    )
    no_controls = "The nearest proxy and noise adapters are left to the audit, which has them for every adapter."
    panels = (
        Panel("psnr_db", "layer", ("route",), {"scope": "alone"}, "One layer alone", "", "PSNR (dB)"),
        Panel("cosine", "layer", ("decoder",), {"scope": "alone"}, "One layer alone", "", "cosine"),
        Panel(
            "psnr_db",
            "blocks",
            ("scope", "route"),
            {"route": ("amortised", "amortised_refined", "stranger")},
            "Blocks from either side",
            "blocks seen",
            "PSNR (dB)",
        ),
        Panel("rank", "layer", ("of",), title="Numerical rank of update and gradient", y_label="rank"),
    )

    def settings(self, world: World) -> list[Setting]:
        blocks = blocks_of(target_of(base_of(world.base, world.device)))
        names = [name for members in blocks.values() for name in members]
        alone, counts = (names[::8], [1, len(blocks)]) if world.quick else (names, list(range(1, len(blocks) + 1)))
        found: list[Setting] = [{"scope": "alone", "layer": name} for name in alone]
        for scope in ("from input", "from output"):
            found += [{"scope": scope, "blocks": count} for count in counts]
        return found

    def measure(self, world: World, setting: Setting, seed: int) -> list[Measured]:
        scene = scene_of(world, seed)
        names = seen_layers(scene.target, setting)
        target = replace(scene.target, layers=tuple(layer for layer in scene.target.layers if layer.name in names))
        pairs = scene.kept.seen_by(target, scene.a)
        victims, strangers = (
            {name: of.updates[name] for name in target.names} for of in (scene.victims, scene.strangers)
        )
        true = Gradient({name: scene.victims.gradient.dense[name] for name in target.names})
        images, labels = scene.victims.images[:, 0], scene.victims.labels[:, 0]
        estimates, classes = Estimates(), ClassMean()
        decoders: tuple[Decoder, ...] = (Projection(), Ridge())
        fit_together(pairs, len(pairs), [*decoders, estimates, classes])
        decoded = {each.kind: each.decode(victims) for each in decoders}
        decoded[classes.kind] = classes.guess(scene.victims.labels)
        measured = []
        for kind, gradient in decoded.items():
            measured.append(Measured("cosine", mean_cosine(gradient, true).tolist(), {"decoder": kind}))
            measured.append(Measured("row_cosine", row_cosine(gradient, true).tolist(), {"decoder": kind}))
        began = time.perf_counter()
        start = estimates.inverter.invert(victims)
        seconds = (time.perf_counter() - began) / len(images)
        rows = {
            "amortised": psnr_db(start.images, images),
            "stranger": psnr_db(estimates.inverter.invert(strangers).images, images),
            "mean_image": mean_image_db(scene.public, images),
        }
        if setting.get("blocks") in (1, len(blocks_of(scene.target))) and not world.quick:
            refined = refine(scene, target, victims, start, labels)
            rows["amortised_refined"] = psnr_db(refined.images, images[: len(refined.images)])
            seconds_refined = refined.seconds / len(refined.images)
            measured.append(Measured("seconds", [seconds_refined], {"route": "amortised_refined"}))
        measured += [Measured("psnr_db", each.tolist(), {"route": route}) for route, each in rows.items()]
        measured.append(Measured("seconds", [seconds], {"route": "amortised"}))
        measured.append(Measured("pairs_per_second", [speed_of(target, pairs.a, scene.public)]))
        if setting["scope"] == "alone":
            measured += ranks_of(victims[names[0]], true.dense[names[0]])
        return measured

    def conclude(self, world: World, table: Table) -> list[str]:
        return [*_alone(table), *_sides(table)]


def seen_layers(target: Target, setting: Setting) -> list[str]:
    """The layers of a setting, in the order of the target."""
    if setting["scope"] == "alone":
        return [str(setting["layer"])]
    members, count = list(blocks_of(target).values()), int(setting["blocks"])
    chosen = members[:count] if setting["scope"] == "from input" else members[-count:]
    return [name for block in chosen for name in block]


def refine(scene: Scene, target: Target, updates: Updates, start: Reconstruction, labels: Tensor) -> Reconstruction:
    """The route amortised_refined for the first victims, from their estimates and true labels."""
    rows, public = slice(0, REFINED_VICTIMS), scene.public
    proxies = Proxies({}, public.batch(slice(None), start.images.device), public.labels, target.base.num_classes)
    problem = Problem(
        target.base,
        target,
        observed={name: each[rows] for name, each in updates.items()},
        a={name: scene.a[name] for name in target.names},
        proxies=proxies,  # the route reads only their images
        found={"amortised": replace(start, labels=labels).take(rows)},
        refinement=AuditConfig().refinement,
    )
    return AmortisedRefined().run(problem, no_progress)


def speed_of(target: Target, a: dict[str, Tensor], public: ImageSet) -> float:
    """Pairs made in a second with these layers adapted."""
    pairs = GeneratedPairs(target, a, public.take(torch.arange(min(TIMED_PAIRS, len(public)))))
    began = time.perf_counter()
    for _ in pairs.batches():
        pass
    return len(pairs) / (time.perf_counter() - began)


def ranks_of(update: Tensor, gradient: Tensor) -> list[Measured]:
    """Numerical and effective rank of every victim's update [V, d_out, r] and gradient [V, d_out, d_in]."""
    measured = []
    for of, matrices in (("update", update), ("gradient", gradient)):
        rank = torch.linalg.matrix_rank(matrices).double()
        measured.append(Measured("rank", rank.tolist(), {"of": of}))
        measured.append(Measured("effective_rank", effective_rank(matrices).tolist(), {"of": of}))
    return measured


def _alone(table: Table) -> list[str]:
    sentences = []
    rows = table.where("psnr_db", scope="alone", route="amortised")
    gains = [gain for row in rows if (gain := table.change(row, route="stranger")) is not None]
    if gains:
        nothing = [str(gain.keys["layer"]) for gain in gains if not gain.positive]
        sentences.append(
            f"Layers whose update alone does not give a better estimate than another image's of the label, the interval"
            f" of the difference reaching 0: {len(nothing)} of {len(gains)} ({', '.join(nothing) or 'none'})."
        )
    if len(rows) > 1:
        best, worst = (choose(rows, key=lambda row: row.mean) for choose in (max, min))
        sentences.append(
            f"Alone, {best.keys['layer']} gives most by the amortised route, {best.words()} dB, and "
            f"{worst.keys['layer']} least, {worst.words()} dB."
        )
    for metric, what in (("cosine", "cosine"), ("row_cosine", "cosine of the leading right singular vectors")):
        decoded = table.where(metric, scope="alone", decoder="ridge")
        if len(decoded) > 1:
            best, worst = (choose(decoded, key=lambda row: row.mean) for choose in (max, min))
            sentences.append(
                f"The {what} by ridge from one layer is highest in {best.keys['layer']} ({best.words(3)}) and lowest "
                f"in {worst.keys['layer']} ({worst.words(3)})."
            )
    ranks = table.where("rank", of="gradient")
    updates = {row.keys["layer"]: row for row in table.where("rank", of="update")}
    higher = [row for row in ranks if row.keys["layer"] in updates and row.mean > updates[row.keys["layer"]].mean]
    if ranks:
        sentences.append(
            f"The gradient has a higher numerical rank than its update, on average over the victims, in {len(higher)} "
            f"of {len(ranks)} layers; it is {min(row.mean for row in ranks):.1f} to "
            f"{max(row.mean for row in ranks):.1f}."
        )
    return sentences


def _sides(table: Table) -> list[str]:
    """One block from either side, and all blocks."""
    sentences = []
    first, last = (
        table.one("psnr_db", scope=scope, blocks=1, route="amortised") for scope in ("from input", "from output")
    )
    if first is not None and last is not None:
        gain = difference(first, last)
        beside = "" if gain is None else f"; the difference is {gain.words()} dB"
        sentences.append(
            f"By the amortised route the first block gives {first.words()} dB and the last {last.words()} dB{beside}."
        )
    rows = table.where("psnr_db", scope="from input", route="amortised")
    if len(rows) > 1:
        end = max(rows, key=lambda row: float(row.keys["blocks"]))
        others = [
            f"{route.replace('_', ' ')} {row.words()} dB"
            for route in ("amortised_refined", "stranger", "mean_image")
            if (row := table.one("psnr_db", scope="from input", route=route, blocks=end.keys["blocks"])) is not None
        ]
        sentences.append("; ".join([f"All {end.keys['blocks']} blocks give {end.words()} dB", *others]) + ".")
    speeds = table.where("pairs_per_second", blocks=1)
    if len(speeds) == 2:
        ours = {row.keys["scope"]: row.mean for row in speeds}
        sentences.append(
            f"Pairs are made at {ours['from input']:.0f} a second for the first block alone and at "
            f"{ours['from output']:.0f} for the last."
        )
    return sentences

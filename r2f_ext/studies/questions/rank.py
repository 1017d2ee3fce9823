"""Study `rank`: what the rank of an adapter determines, by tokens and images, and when no decoder is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import ImageSet
from r2f_ext.decoders import Decoder, Projection, Ridge
from r2f_ext.inversion.adapter_rowspace import count_adapter_rowspace, invert_adapter_rowspace
from r2f_ext.inversion.attention_rowspace import count_attention_rowspace
from r2f_ext.inversion.exactness import in_float64
from r2f_ext.pairs import Training, Victims, simulate
from r2f_ext.studies.pairs_in_memory import PairsInMemory
from r2f_ext.studies.scene import (
    ClassMean,
    Estimates,
    base_of,
    closed_form,
    exact_gradients_of,
    fit_together,
    images_of_seed,
    mean_cosine,
    mean_image_db,
    start_of,
    target_of,
    victims_of,
)
from r2f_ext.studies.study import Measured, Panel, Setting, Study, World
from r2f_ext.studies.table import Table
from r2f_ext.types import Gradient, LoraUpdate, Target

IMAGES, PAIRS = 16, 400
QUICK_IMAGES, QUICK_PAIRS = 2, 60
RANKS, BATCHES = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16)
TWO_STEPS = Training(steps=2)
# (images, rank) of long training: for one image and for four, a rank below the bound of Jang et al. and one above it.
TRAINED, TRAINED_STEPS, TRAINED_VICTIMS = ((1, 2), (1, 8), (4, 8), (4, 32)), (30, 300), 2
DECAY = Training(lr=0.3, weight_decay=0.1, schedule="linear")  # with a constant step size the training would oscillate
PRECISIONS = ("float32", "float64")
SKIPPED = 0.999  # mean cosine from which on the conclusions say that no decoder is needed


@dataclass(frozen=True)
class Scene:
    """One seed's private images and strangers, and the captured proxies from which the pairs of every rank are made."""

    private: ImageSet
    strangers: ImageSet
    public: ImageSet
    captured: PairsInMemory


@lru_cache(maxsize=1)
def scene_of(world: World, seed: int) -> Scene:
    """What all settings of one seed share."""
    base, data = base_of(world.base, world.device), world.data[0]
    count, pairs_count = (QUICK_IMAGES, QUICK_PAIRS) if world.quick else (IMAGES, PAIRS)
    private, strangers, fitted = images_of_seed(base, data, seed, count, pairs_count)
    return Scene(private, strangers, fitted, PairsInMemory.of_images(target_of(base), fitted))


def by_movement(target: Target, a0: dict[str, Tensor], victims: Victims, training: Training) -> Gradient:
    """The average gradients, computed without a decoder from the factors of T >= 2 steps of plain SGD (Direction 2).

    B_T is -(sum of step sizes) s G A_0^T to first order, and the rows of A_T - A_0 span those of G if r is at least its
    rank. With a basis V of that span, G = C V and C = (G A_0^T) pinv(V A_0^T). Movement smaller than the rounding error
    of A is ignored.
    """
    found = {}
    for layer in target.layers:
        update = victims.b[layer.name] / (-sum(training.rates()) * layer.scale)
        start = a0[layer.name].to(update)
        _, sizes, basis = torch.linalg.svd(victims.a[layer.name] - start, full_matrices=False)
        clear = (sizes > torch.finfo(start.dtype).eps * start.norm())[..., None]
        basis = torch.where(clear, basis, 0)
        found[layer.name] = update @ torch.linalg.pinv(basis @ start.mT) @ basis
    return Gradient(found)


def misfit_of_a(target: Target, trained: Victims, gradient: Gradient, decay: float) -> Tensor:
    """|decay A + s B^T G| / |decay A| (docs/methods.md, section 6) over all layers, [V]; 0 at a stationary point."""
    missed = kept = torch.zeros(1, device=target.base.device)
    for layer in target.layers:
        decayed = decay * trained.a[layer.name]
        pull = layer.scale * trained.b[layer.name].mT @ gradient.dense[layer.name]
        missed = missed + (decayed + pull).square().sum((1, 2))
        kept = kept + decayed.square().sum((1, 2))
    return (missed / kept).sqrt()


class Rank(Study):
    """Study `rank`: what an update determines of the gradient and the image, by rank and number of images."""

    name = "rank"
    question = "From which rank on can the decoder be skipped?"
    method = (
        f"{IMAGES} private images a seed, in victims of b images each that adapt every linear layer of the blocks. "
        "After one step the update is G A^T: `projection` is what it determines of G, beside sqrt(r / d_in), what a "
        f"random A of rank r keeps of any matrix; `ridge` ({PAIRS} pairs of one image) fills in the rest. After two "
        f"steps (lr {TWO_STEPS.lr:g}) with known A_0 the movement of A spans rows of G, and no decoder is needed once r"
        " reaches the rank of G: `movement`, trained and stored in float32 or float64. The closed form reads what each "
        "of these gives, and `adapter_rowspace` the factors themselves. `jang` is r(r + 1) / 2 over K N (Jang et al., "
        "arXiv 2402.11867, with K outputs and N images; above 1 no local minimum is spurious in the NTK regime). KKT: "
        f"{TRAINED_VICTIMS} victims a seed train on N images, all in every step, with weight decay "
        f"{DECAY.weight_decay:g} and a step size that falls from {DECAY.lr:g} to 0; `misfit` is |decay A + s B^T G| / "
        "|decay A| over all layers, which is 0 at a stationary point, and `start_left` the cosine of A with A_0. "
        "Controls: the class-mean gradient beside cosines (one image); the mean image, and the amortised estimate from "
        "another image of the label, beside PSNR."
    )
    no_controls = "The nearest proxy and noise adapters are left to the audit, which has them for every adapter."
    panels = (
        Panel("cosine", "rank", ("decoder",), {"images": 1}, "One image: cosine with the gradient", x_log=True),
        Panel(
            "cosine",
            "rank",
            ("images",),
            {"decoder": "movement, float64"},
            "Two steps, float64: cosine by images a victim",
            x_log=True,
        ),
        Panel("psnr_db", "rank", ("route", "decoder", "stored"), {"images": 1}, "One image", x_log=True),
        Panel(
            "misfit",
            "steps",
            ("images", "rank"),
            title="Distance from stationarity in A",
            y_label="|decay A + s B^T G| / |decay A|",
            x_log=True,
        ),
    )

    def settings(self, world: World) -> list[Setting]:
        ranks, batches = ((8, 64), (1,)) if world.quick else (RANKS, BATCHES)
        trained, steps = (TRAINED[1:2], (10,)) if world.quick else (TRAINED, TRAINED_STEPS)
        found: list[Setting] = [{"images": batch, "rank": rank} for batch in batches for rank in ranks]
        return found + [{"images": n, "rank": rank, "steps": t} for n, rank in trained for t in steps]

    def measure(self, world: World, setting: Setting, seed: int) -> list[Measured]:
        scene = scene_of(world, seed)
        images, rank = int(setting["images"]), int(setting["rank"])
        base = base_of(world.base, world.device)
        target = target_of(base, rank)
        a = start_of(target, seed)
        jang = Measured("jang", [rank * (rank + 1) / 2 / (base.num_classes * images)])
        if "steps" in setting:
            return [jang, *stationarity(target, a, scene.private, images, int(setting["steps"]))]
        victims = victims_of(target, a, scene.private, Training(batch=images))
        expected = [(rank / layer.d_in) ** 0.5 for layer in target.layers]
        measured = [jang, Measured("cosine", [sum(expected) / len(expected)], {"decoder": "sqrt(r / d_in)"})]
        gradient = victims.gradient
        ranks = torch.stack([torch.linalg.matrix_rank(each).double() for each in gradient.dense.values()])
        measured.append(Measured("gradient_rank", ranks.mean(0).tolist()))
        decoded = {}
        for precision in PRECISIONS:
            precise = in_float64(target) if precision == "float64" else target
            pixels = victims.images.to(next(precise.base.model.parameters()).dtype)
            trained = simulate(precise, a, pixels, victims.labels, replace(TWO_STEPS, batch=images))
            moved = by_movement(target, a, trained, TWO_STEPS)
            true = Gradient({name: trained.gradient.dense(name) for name in target.names})
            measured.append(_cosine(f"movement, {precision}", moved, true))
            if images == 1:
                decoded[f"movement, {precision}"] = moved
                measured += adapter_forms(precise, a, trained, victims.images[:, 0], precision)
        if images > 1:
            projection = Projection()
            projection.start(scene.captured.seen_by(target, a), 0)
            return [*measured, _cosine("projection", projection.decode(victims.updates), gradient)]
        decoders: tuple[Decoder, ...] = (Projection(), Ridge())
        estimates, classes = Estimates(), ClassMean()
        pairs = scene.captured.seen_by(target, a)
        fit_together(pairs, len(pairs), [*decoders, estimates, classes])
        fitted = {each.kind: each.decode(victims.updates) for each in decoders}
        fitted[classes.kind] = classes.guess(victims.labels)
        measured += [_cosine(kind, each, gradient) for kind, each in fitted.items()]
        originals = victims.images[:, 0]
        strangers = victims_of(target, a, scene.strangers).updates
        rows = {
            "amortised": psnr_db(estimates.inverter.invert(victims.updates).images, originals),
            "stranger": psnr_db(estimates.inverter.invert(strangers).images, originals),
            "mean_image": mean_image_db(scene.public, originals),
        }
        measured += [Measured("psnr_db", each.tolist(), {"route": route}) for route, each in rows.items()]
        return measured + closed_forms({**decoded, "projection": fitted["projection"]}, target, originals)

    def conclude(self, world: World, table: Table) -> list[str]:
        return [*_skipping(table), *_quality(table), *_kkt(table)]


def _cosine(kind: str, decoded: Gradient, true: Gradient) -> Measured:
    same = Gradient({name: dense.to(true.dense[name]) for name, dense in decoded.dense.items()})
    return Measured("cosine", mean_cosine(same, true).tolist(), {"decoder": kind})


def closed_forms(decoded: dict[str, Gradient], target: Target, originals: Tensor) -> list[Measured]:
    """PSNR of the closed form of the first attention layer on every decoded gradient; none where its count refuses."""
    if not count_attention_rowspace(target.base).identifiable:
        return []
    measured = []
    for kind, gradient in decoded.items():
        psnr = psnr_db(closed_form(target.base, gradient), originals)
        measured.append(Measured("psnr_db", psnr.tolist(), {"route": "attention_rowspace", "decoder": kind}))
    return measured


def adapter_forms(
    target: Target, a: dict[str, Tensor], trained: Victims, originals: Tensor, stored: str
) -> list[Measured]:
    """PSNR of the closed form of the factors themselves; none where its count refuses the base or the rank."""
    if not count_adapter_rowspace(target.base, target, TWO_STEPS.steps).identifiable:
        return []
    solved = []
    for victim in range(len(originals)):
        victim_a, victim_b = ({name: each[victim] for name, each in of.items()} for of in (trained.a, trained.b))
        start = {name: each.to(victim_a[name]) for name, each in a.items()}
        solved.append(invert_adapter_rowspace(target, LoraUpdate(victim_a, victim_b, start)).images)
    psnr = psnr_db(torch.cat(solved), originals)
    return [Measured("psnr_db", psnr.tolist(), {"route": "adapter_rowspace", "stored": stored})]


def stationarity(target: Target, a: dict[str, Tensor], private: ImageSet, images: int, steps: int) -> list[Measured]:
    """How close victims are to a stationary point after training on `images` images with weight decay."""
    count = TRAINED_VICTIMS if len(private) >= TRAINED_VICTIMS * images else 1
    rows, device = slice(0, count * images), target.base.device
    pixels = private.batch(rows, device).unflatten(0, (count, images))
    labels = private.labels[rows].to(device).unflatten(0, (count, images))
    recipe = replace(DECAY, batch=images)
    trained = simulate(target, a, pixels, labels, replace(recipe, steps=steps), dense=True)
    after = simulate(target, trained.a, pixels, labels, Training(batch=images), b=trained.b)  # for its gradient
    gradient = Gradient({name: after.gradient.dense(name) for name in target.names})
    first = exact_gradients_of(target, pixels, labels)
    left = [F.cosine_similarity(trained.a[name].flatten(1), a[name].flatten()[None]) for name in target.names]
    size = [gradient.dense[n].flatten(1).norm(dim=1) / first.dense[n].flatten(1).norm(dim=1) for n in target.names]
    return [
        Measured("misfit", misfit_of_a(target, trained, gradient, DECAY.weight_decay).tolist()),
        Measured("start_left", torch.stack(left).mean(0).tolist()),
        Measured("gradient_left", torch.stack(size).mean(0).tolist()),
    ]


def _skipping(table: Table) -> list[str]:
    """Whether one step determines the gradient, and from which rank on two steps do, beside the line of Jang et al."""
    sentences = []
    largest = max((int(row.keys["rank"]) for row in table.where("cosine", decoder="projection")), default=0)
    projection = table.one("cosine", images=1, rank=largest, decoder="projection")
    expected = table.one("cosine", images=1, rank=largest, decoder="sqrt(r / d_in)")
    if projection is not None and expected is not None:
        enough = "determine" if projection.mean >= SKIPPED else "do not determine"
        sentences.append(
            f"After one step rank {largest} and A {enough} the gradient: the projection has a cosine of "
            f"{projection.words(3)}, and {expected.mean:.3f} would be that of any matrix (sqrt(r / d_in))."
        )
    for images in dict.fromkeys(int(row.keys["images"]) for row in table.where("gradient_rank")):
        rank = max(row.mean for row in table.where("gradient_rank", images=images))
        for stored in PRECISIONS:
            rows = table.where("cosine", images=images, decoder=f"movement, {stored}")
            first = min((int(row.keys["rank"]) for row in rows if row.mean >= SKIPPED), default=None)
            if rows:
                best = max(rows, key=lambda row: row.mean)
                verdict = "stays below" if first is None else f"from rank {first} on reaches"
                sentences.append(
                    f"After two steps in {stored} on {_images(images)} the gradient that the movement of A gives "
                    f"without a decoder {verdict} a mean cosine of {SKIPPED:g} (its best is {best.words(4)}, at rank "
                    f"{best.keys['rank']}); the gradients have a rank of {rank:.0f} on average over layers."
                )
        above = [int(row.keys["rank"]) for row in table.where("jang", images=images) if row.mean > 1]
        sentences.append(
            f"With {_images(images)} r(r + 1) / 2 exceeds K N from rank {min(above)} on."
            if above
            else f"With {_images(images)} r(r + 1) / 2 does not exceed K N at any rank measured."
        )
    return sentences


def _quality(table: Table) -> list[str]:
    """PSNR of each route at the smallest and the largest rank, beside the controls."""
    sentences = []
    rows = table.where("psnr_db", images=1)
    for route, decoder, stored in dict.fromkeys(
        (str(row.keys["route"]), row.keys.get("decoder"), row.keys.get("stored")) for row in rows
    ):
        own = [
            row
            for row in rows
            if (row.keys["route"], row.keys.get("decoder"), row.keys.get("stored")) == (route, decoder, stored)
        ]
        least, most = (pick(own, key=lambda row: int(row.keys["rank"])) for pick in (min, max))
        of = "".join(f", {what}" for what in (decoder, stored) if what)
        ends = f"{least.words()} dB at rank {least.keys['rank']}"
        if most is not least:
            ends += f" and {most.words()} dB at rank {most.keys['rank']}"
        sentences.append(f"{route}{of}: {ends}.")
    return sentences


def _kkt(table: Table) -> list[str]:
    """How stationary the longest training is."""
    rows = table.where("misfit")
    longest = max((int(row.keys["steps"]) for row in rows), default=0)
    sentences = []
    for row in rows:
        left = table.one("start_left", **row.keys)
        if row.keys["steps"] == longest and left is not None:
            sentences.append(
                f"After {longest} steps on {_images(int(row.keys['images']))} at rank {row.keys['rank']} A misses "
                f"stationarity by {row.words(2)} of its decay term (0: it holds), and the cosine of A with its start "
                f"is {left.words(2)}."
            )
    return sentences


def _images(count: int) -> str:
    return "one image" if count == 1 else f"{count} images"

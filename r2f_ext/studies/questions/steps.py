"""Study `steps`: how the averaging approximation (Eq. 6) and the image degrade with the victim's training length."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from r2f_ext.data import ImageSet
from r2f_ext.decoders import Projection, Ridge
from r2f_ext.inversion.adapter_rowspace import count_adapter_rowspace, invert_adapter_rowspace
from r2f_ext.pairs import GeneratedPairs, PairSource, SimulatedPairs, Training, simulate
from r2f_ext.studies.pairs_in_memory import PairsInMemory
from r2f_ext.studies.scene import (
    ClassMean,
    Estimates,
    base_of,
    fit_together,
    mean_cosine,
    private_images,
    start_of,
    strangers_of,
    target_of,
    victims_of,
)
from r2f_ext.studies.strangers import clearly_above, joined, nearest_db, public_parts
from r2f_ext.studies.study import Measured, Panel, Setting, Study, World
from r2f_ext.studies.table import Table, difference
from r2f_ext.types import Gradient, LoraUpdate, Target

STEPS = (1, 2, 5, 10, 20, 50, 100)
RATES = {"sgd": 0.1, "adamw": 1e-3}
NAMES = {"sgd": "SGD", "adamw": "AdamW"}
ONE, FRESH = "one image", "a fresh image a step"
ROWSPACE_RANK = 64  # the closed form needs a rank of at least the number of patches, 64 in the embedded base
ROWSPACE_VICTIMS, ROWSPACE_STEPS = 3, (2, 10, 100)
ROWSPACE = (("sgd", "float32"), ("sgd", "float64"), ("adamw", "float64"))
STORED = {"float32": torch.float32, "float64": torch.float64}  # dtype of the file and of the victim's training
ONE_STEP, OWN_RECIPE, AS_FEW = "one step", "own recipe", "one step, as few pairs"  # what a decoder is fitted to
OWN_SEED = 0
OWN_STEPS = (1, 2, 5)  # numbers of steps for which a decoder is also fitted to pairs of the victim's own recipe


@dataclass(frozen=True)
class Sizes:
    """Numbers per seed: victims, pairs of the amortised route, of decoders, of the victim's own recipe, strangers."""

    victims: int
    pairs: int
    decoder_pairs: int
    own_pairs: int
    strangers: int


FULL, QUICK = Sizes(5, 1200, 400, 200, 400), Sizes(2, 60, 60, 24, 40)


@dataclass(frozen=True)
class Scene:
    """What the settings of one seed share: the adapter's start, public images and what was fitted to one-step pairs."""

    target: Target
    a: dict[str, Tensor]
    private: ImageSet
    further: ImageSet
    strangers: ImageSet
    own: ImageSet
    mean: Tensor
    ridge: Ridge
    projection: Projection
    class_mean: ClassMean
    estimates: Estimates


@lru_cache(maxsize=1)
def scene_of(world: World, seed: int) -> Scene:
    sizes, base, data = world.of(FULL, QUICK), base_of(world.base, world.device), world.data[0]
    longest = 1 if world.quick else max(STEPS)
    parts = (sizes.pairs, sizes.strangers, sizes.victims * longest, sizes.own_pairs * max(OWN_STEPS))
    proxy, strangers, further, own = public_parts(base, data, seed, parts)
    target = target_of(base)
    a = start_of(target, seed)
    ridge, projection, class_mean, estimates = Ridge(), Projection(), ClassMean(), Estimates()
    kept = PairsInMemory.of(GeneratedPairs(target, a, proxy), sizes.decoder_pairs)
    fit_together(kept, sizes.decoder_pairs, [ridge, projection, class_mean])
    fit_together(GeneratedPairs(target, a, proxy), sizes.pairs, [estimates])
    private, mean = private_images(base, data, seed, sizes.victims), proxy.batch(slice(None)).mean(0)
    return Scene(target, a, private, further, strangers, own, mean, ridge, projection, class_mean, estimates)


def training_of(setting: Setting) -> Training:
    optimizer, steps = str(setting["optimizer"]), int(setting["T"])
    owned = steps if setting["images"] == FRESH else 1
    return Training(steps, samples=owned, optimizer=optimizer, lr=RATES[optimizer])


def owned_by(private: ImageSet, further: ImageSet, owned: int) -> ImageSet:
    """The images of all victims, `owned` each: a private image, then further images that no other victim has."""
    victims = len(private)
    own = torch.arange(victims)[:, None], victims + torch.arange(victims * (owned - 1)).view(victims, -1)
    return joined(private, further).take(torch.cat(own, dim=1).flatten())


class Steps(Study):
    """Study `steps`: cosine and PSNR by the number of steps T, for SGD and AdamW, on one image or on many."""

    name = "steps"
    question = "How do the decoded gradient and the image degrade with the number of steps T that the victim trained?"
    method = (
        f"{FULL.victims} victims a seed (r = 8, alpha = 16, all linear layers of the blocks, batch 1) train T steps of "
        f"SGD ({RATES['sgd']:g}) or AdamW ({RATES['adamw']:g}), on one image or on a fresh one a step: the private one "
        "first, then public ones that nothing else reads. The decoders' target is the gradient averaged over the steps "
        f"(Eq. 6). They are fitted to {FULL.decoder_pairs} pairs of one SGD step, the amortised route to {FULL.pairs}. "
        f"In seed {OWN_SEED}, for T up to {max(OWN_STEPS)} because such pairs cost T passes each, the ridge is fitted "
        f"to {FULL.own_pairs} pairs of the victim's own recipe too (where that is on one image, the amortised route "
        "also), beside a ridge of as many one-step pairs. Of several images PSNR is to the nearest, also of controls. "
        f"`adapter_rowspace` reads adapters of rank {ROWSPACE_RANK} on one image ({ROWSPACE_VICTIMS} victims a seed), "
        "trained and stored in float32 or float64, with A_0 known; at T = 1 its count refuses. Controls: the mean "
        "gradient of the true labels and the projection beside cosines; beside PSNR the public mean image and the "
        "estimate from a stranger, trained alike on other images of the same labels. `above_stranger_db` is the gain "
        "over it, victim by victim."
    )
    no_controls = (
        "The class-mean image, the nearest proxy and noise adapters are left to the audit, which has them for every "
        "adapter."
    )
    panels = (
        Panel("cosine", "T", ("decoder", "optimizer"), {"images": ONE, "fitted": ONE_STEP}, ONE, x_log=True),
        Panel("cosine", "T", ("decoder", "optimizer"), {"images": FRESH, "fitted": ONE_STEP}, FRESH, x_log=True),
        Panel("psnr_db", "T", ("route", "optimizer"), {"images": ONE, "fitted": ONE_STEP}, ONE, x_log=True),
        Panel("psnr_db", "T", ("route", "optimizer"), {"images": FRESH, "fitted": ONE_STEP}, FRESH, x_log=True),
        Panel(
            "cosine",
            "T",
            ("optimizer", "images", "fitted"),
            {"decoder": "ridge", "fitted": (OWN_RECIPE, AS_FEW)},
            "Fitted to one step or to the victim's own recipe",
            x_log=True,
        ),
        Panel(
            "psnr_db",
            "T",
            ("route", "optimizer", "stored"),
            {"rank": ROWSPACE_RANK},
            "Movement of A, rank 64",
            x_log=True,
        ),
    )

    def settings(self, world: World) -> list[Setting]:
        steps = (1, 5) if world.quick else STEPS
        images = (ONE,) if world.quick else (ONE, FRESH)
        found: list[Setting] = [
            {"optimizer": optimizer, "images": of, "rank": 8, "T": t}
            for optimizer in RATES
            for of in images
            for t in steps
        ]
        base = base_of(world.base, world.device)
        if count_adapter_rowspace(base, target_of(base, ROWSPACE_RANK), steps=2).identifiable:
            found += [
                {"optimizer": optimizer, "images": ONE, "rank": ROWSPACE_RANK, "stored": stored, "T": t}
                for optimizer, stored in ROWSPACE
                for t in (ROWSPACE_STEPS[:1] if world.quick else ROWSPACE_STEPS)
            ]
        return found

    def measure(self, world: World, setting: Setting, seed: int) -> list[Measured]:
        scene = scene_of(world, seed)
        training = training_of(setting)
        if setting["rank"] == ROWSPACE_RANK:
            return _rowspace(scene, setting, training, seed)
        victims, owned = len(scene.private), owned_by(scene.private, scene.further, training.owned)
        both = joined(owned, strangers_of(owned, scene.strangers, seed))
        seen = victims_of(scene.target, scene.a, both, training, seed)
        own = {name: update[:victims] for name, update in seen.updates.items()}
        true = Gradient({name: dense[:victims] for name, dense in seen.gradient.dense.items()})
        originals, labels = seen.images[:victims], seen.labels[:victims]
        one_step = {"fitted": ONE_STEP}
        decoded = {
            "ridge": scene.ridge.decode(own),
            "projection": scene.projection.decode(own),
            "class_mean_gradient": scene.class_mean.guess(labels),
        }
        found = [
            Measured("cosine", mean_cosine(each, true).tolist(), {"decoder": kind, **one_step})
            for kind, each in decoded.items()
        ]
        images = scene.estimates.inverter.invert(seen.updates).images
        found += _psnr(originals, images[:victims], images[victims:], scene.mean, "amortised", one_step)
        if seed == OWN_SEED and training.steps in OWN_STEPS:
            found += _own_recipe(world, scene, training, seen.updates, true, originals)
        return found

    def conclude(self, world: World, table: Table) -> list[str]:
        parts = [_one_recipe(table, optimizer, images) for images in (ONE, FRESH) for optimizer in RATES]
        parts += [_of_rowspace(table, optimizer, stored) for optimizer, stored in ROWSPACE]
        return [sentence for bad, _ in parts for sentence in bad] + [each for _, good in parts for each in good]


@lru_cache(maxsize=1)
def few_of(world: World, seed: int) -> tuple[Ridge, Estimates]:
    """Ridge and amortised route, fitted to as many one-step pairs as there are pairs of the victim's own recipe."""
    scene = scene_of(world, seed)
    return _fitted(GeneratedPairs(scene.target, scene.a, scene.own), world.of(FULL, QUICK).own_pairs)


def _fitted(pairs: PairSource, count: int) -> tuple[Ridge, Estimates]:
    ridge, estimates = Ridge(), Estimates()
    fit_together(PairsInMemory.of(pairs, count), count, [ridge, estimates])
    return ridge, estimates


def _own_recipe(
    world: World, scene: Scene, training: Training, updates: dict[str, Tensor], true: Gradient, originals: Tensor
) -> list[Measured]:
    """A ridge fitted to pairs of the victim's own recipe, and one fitted to as many one-step pairs.

    If victims have one image each, the amortised route too.
    """
    count, victims = world.of(FULL, QUICK).own_pairs, len(originals)
    own = {name: update[:victims] for name, update in updates.items()}
    recipe = _fitted(SimulatedPairs(scene.target, scene.a, scene.own, training, dense=True), count)
    found: list[Measured] = []
    for fitted, (ridge, estimates) in {OWN_RECIPE: recipe, AS_FEW: few_of(world, OWN_SEED)}.items():
        cosine = mean_cosine(ridge.decode(own), true)
        found.append(Measured("cosine", cosine.tolist(), {"decoder": "ridge", "fitted": fitted}))
        if training.owned == 1:
            images = estimates.inverter.invert(updates).images
            labels = {"fitted": fitted}
            found += _psnr(originals, images[:victims], images[victims:], scene.mean, "amortised", labels)
    return found


def _rowspace(scene: Scene, setting: Setting, training: Training, seed: int) -> list[Measured]:
    """The closed form on the movement of A; controls are the mean image and the estimate from a stranger's adapter."""
    base, dtype = scene.target.base, STORED[str(setting["stored"])]
    target = target_of(replace(base, model=copy.deepcopy(base.model).to(dtype)), ROWSPACE_RANK)
    a0 = {name: a.to(dtype) for name, a in start_of(target, seed).items()}
    private = scene.private.take(torch.arange(min(ROWSPACE_VICTIMS, len(scene.private))))
    both = joined(private, strangers_of(private, scene.strangers, seed))
    originals, labels = both.batch(slice(None), base.device), both.labels.to(base.device)
    trained = simulate(target, a0, originals[:, None].to(dtype), labels[:, None], training)
    images = []
    for v in range(len(both)):
        a, b = ({name: each[v] for name, each in of.items()} for of in (trained.a, trained.b))
        images.append(invert_adapter_rowspace(target, LoraUpdate(a, b, a0)).images)
    victims, found = len(private), torch.cat(images)
    return _psnr(originals[:victims, None], found[:victims], found[victims:], scene.mean, "adapter_rowspace", {})


def _psnr(
    originals: Tensor, found: Tensor, strangers: Tensor, mean: Tensor, route: str, labels: Setting
) -> list[Measured]:
    """PSNR of a route's images, of its images for strangers, and of the mean image, against originals [V, n, c, h, w].

    `above_stranger_db` is the difference of the first two, victim by victim.
    """
    images = {route: found, "stranger": strangers, "mean_image": mean.expand_as(found)}
    near = {name: nearest_db(each, originals) for name, each in images.items()}
    figures = [Measured("psnr_db", db.tolist(), {"route": name, **labels}) for name, db in near.items()]
    above = (near[route] - near["stranger"]).tolist()
    return [*figures, Measured("above_stranger_db", above, {"route": route, **labels})]


def _one_recipe(table: Table, optimizer: str, images: str) -> tuple[list[str], list[str]]:
    """(Negative results, other results) as sentences, for one optimizer on one image or on fresh images."""
    keys = {"optimizer": optimizer, "images": images, "fitted": ONE_STEP}
    ridge = {int(row.keys["T"]): row for row in table.where("cosine", decoder="ridge", **keys)}
    bad: list[str] = []
    good: list[str] = []
    name = f"{NAMES[optimizer]} on {images}"
    if ridge:
        first, last = min(ridge), max(ridge)
        control = table.one("cosine", decoder="class_mean_gradient", T=last, **keys)
        words = f"{name}: the ridge's cosine to the average gradient is {ridge[first].words(3)} at T = {first}"
        words += f" and {ridge[last].words(3)} at T = {last}" if last > first else ""
        words += f", where the label's mean gradient has {control.words(3)}." if control else "."
        (good if clearly_above(ridge[last], control) else bad).append(words)
    above = {int(row.keys["T"]): row for row in table.where("above_stranger_db", route="amortised", **keys)}
    ahead = [t for t, row in above.items() if row.positive]
    if ahead:
        end = max(ahead)
        good.append(
            f"{name}: the amortised estimate is clearly nearer to the image than a stranger's at T = "
            f"{', '.join(map(str, ahead))} of {', '.join(map(str, above))}; at T = {end} by {above[end].words()} dB."
        )
    elif above:
        bad.append(f"{name}: at no T is the amortised estimate clearly nearer to the image than a stranger's.")
    own = {int(row.keys["T"]): row for row in table.where("cosine", **{**keys, "fitted": OWN_RECIPE})}
    if own:
        t = max(own)
        few = table.one("cosine", decoder="ridge", T=t, **{**keys, "fitted": AS_FEW})
        gain = None if few is None else difference(own[t], few)
        helps = gain is not None and gain.positive
        words = f"{name}: a ridge fitted to pairs of the victim's own {t} steps {'is' if helps else 'is not'} clearly "
        words += f"better than one of as many one-step pairs: {own[t].words(3)}"
        words += f" against {few.words(3)}" if few else ""
        (good if helps else bad).append(words + (f", a gain of {gain.words(3)}." if gain else "."))
    return bad, good


def _of_rowspace(table: Table, optimizer: str, stored: str) -> tuple[list[str], list[str]]:
    keys = {"optimizer": optimizer, "stored": stored}
    rows = {int(row.keys["T"]): row for row in table.where("psnr_db", route="adapter_rowspace", **keys)}
    if not rows:
        return [], []
    ahead = [t for t in rows if clearly_above(rows[t], table.one("psnr_db", route="mean_image", T=t, **keys))]
    each = "; ".join(f"{row.words()} dB at T = {t}" for t, row in sorted(rows.items()))
    words = f"The closed form of A's movement after {NAMES[optimizer]} (rank {ROWSPACE_RANK}, {stored}) gives {each}"
    verdict = (
        f"clearly above the mean image at T = {', '.join(map(str, ahead))}"
        if ahead
        else "nowhere clearly above the mean image"
    )
    sentence = [f"{words}: {verdict}."]
    return ([], sentence) if ahead else (sentence, [])

"""Study `batch`: how many images of an averaged gradient (Eq. 8) can be recovered, by batch size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from r2f_ext.audit.assign import assign_groups
from r2f_ext.audit.metrics import psnr_db
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet
from r2f_ext.decoders import Projection, Ridge, RowLMMSE, Updates
from r2f_ext.inversion.attention_rowspace import count_attention_rowspace
from r2f_ext.inversion.channels import without_foreign_colours
from r2f_ext.inversion.matching import match
from r2f_ext.inversion.objectives import GradientObjective, Objective, UpdateObjective
from r2f_ext.pairs import GeneratedPairs, Training, updates_of
from r2f_ext.studies.groups import GroupRidge, draw_groups, fitting_groups, group_mean
from r2f_ext.studies.pairs_in_memory import PairsInMemory
from r2f_ext.studies.scene import (
    ClassMean,
    Observed,
    base_of,
    closed_form,
    fit_together,
    mean_cosine,
    private_images,
    start_of,
    target_of,
    victims_of,
)
from r2f_ext.studies.strangers import STRANGERS, clearly_above, public_parts
from r2f_ext.studies.study import Measured, Panel, Setting, Study, World
from r2f_ext.studies.table import Table
from r2f_ext.types import Gradient, Target

BATCHES = (1, 2, 4, 8, 16, 32)
GROUPS = 1000  # groups that the amortised route is fitted to
SEARCHED, SEARCHED_BATCHES = 8, (1, 4, 8)  # images and batch sizes of the searches, in seed 0


@dataclass(frozen=True)
class Sizes:
    """Numbers per seed: private images, proxies, proxies of decoders, strangers, groups of a fit, searched images."""

    images: int
    pairs: int
    decoder_pairs: int
    strangers: int
    groups: int
    searched: int


FULL, QUICK = Sizes(32, 2000, 400, 800, GROUPS, SEARCHED), Sizes(2, 120, 60, 60, 60, 0)


@dataclass(frozen=True)
class Scene:
    """What the settings of one seed share: updates of single proxies and strangers, decoders fitted to single pairs."""

    target: Target
    a: dict[str, Tensor]
    private: ImageSet
    proxy: ImageSet
    strangers: ImageSet
    single: Updates
    of_strangers: Updates
    decoders: tuple[Ridge | RowLMMSE | Projection, ...]
    class_mean: ClassMean


@lru_cache(maxsize=1)
def scene_of(world: World, seed: int) -> Scene:
    sizes, base, data = world.of(FULL, QUICK), base_of(world.base, world.device), world.data[0]
    proxy, strangers = public_parts(base, data, seed, (sizes.pairs, sizes.strangers))
    target = target_of(base)
    a = start_of(target, seed)
    decoders, class_mean = (Ridge(), RowLMMSE(), Projection()), ClassMean()
    kept = PairsInMemory.of(GeneratedPairs(target, a, proxy), sizes.decoder_pairs)
    fit_together(kept, sizes.decoder_pairs, [*decoders, class_mean])
    private = private_images(base, data, seed, sizes.images)
    single, of_strangers = (single_updates(target, a, images) for images in (proxy, strangers))
    return Scene(target, a, private, proxy, strangers, single, of_strangers, decoders, class_mean)


def single_updates(target: Target, a: dict[str, Tensor], images: ImageSet) -> Updates:
    """name -> updates of one step on each image alone, flat [n, d_out * r]. A batch's update is a mean of these."""
    return {name: update.flatten(1) for name, update in updates_of(GeneratedPairs(target, a, images)).items()}


class Batch(Study):
    """Study `batch`: PSNR of the images of one averaged gradient, and how many are recovered, by batch size."""

    name = "batch"
    question = "Up to which batch size can single images be recovered from one averaged gradient?"
    method = (
        f"{FULL.images} private images a seed are cut into batches of b, so that every b has the same images and "
        f"b = {max(BATCHES)} is one victim a seed. Each victim takes one SGD step on its batch (r = 8, alpha = 16, all "
        "linear layers of the blocks); the attacker knows the labels. For each victim the amortised route is fitted to "
        f"{FULL.groups} batches of other images with the same labels (their updates are averages of the single ones of "
        f"{FULL.pairs} proxies); it predicts one image a label, the mean of them where a label occurs twice. Estimates "
        "are assigned to originals by the Hungarian method, those of controls alike. An image counts as recovered if "
        f"its estimate is nearer to it than those from each of {STRANGERS} other batches with the same labels, as "
        f"happens by chance to {100 / (STRANGERS + 1):.0f} % of images. In seed 0, for b in "
        f"{', '.join(map(str, SEARCHED_BATCHES))} and {FULL.searched} images, gradient matching (the audit's "
        "refinement) starts from the amortised estimate, on the exact gradient, on what the ridge decodes, or on the "
        "update. `attention_rowspace` solves the exact gradient where its count allows; its strangers are other images "
        f"of the label themselves. Decoders are fitted to {FULL.decoder_pairs} single pairs. Controls: the mean "
        "gradient of the true labels and the projection beside cosines; strangers, the mean image and the label's mean "
        "image beside PSNR."
    )
    no_controls = "The nearest proxy and noise adapters are left to the audit, which has them for every adapter."
    panels = (
        Panel("recovered", "b", ("route",), title="Share of images recovered", y_label="share", x_log=True),
        Panel("recovered_a_batch", "b", ("route",), title="Images recovered of a batch", x_log=True),
        Panel("psnr_db", "b", ("route", "gradient"), x_log=True, title="Reconstruction"),
        Panel("cosine", "b", ("decoder",), x_log=True, title="Decoders of single pairs on averaged gradients"),
    )

    def settings(self, world: World) -> list[Setting]:
        return [{"b": b} for b in ((1, 2) if world.quick else BATCHES)]

    def measure(self, world: World, setting: Setting, seed: int) -> list[Measured]:
        scene, sizes, b = scene_of(world, seed), world.of(FULL, QUICK), int(setting["b"])
        seen = victims_of(scene.target, scene.a, scene.private, Training(batch=b), seed)
        decoded = {each.kind: each.decode(seen.updates) for each in scene.decoders}
        compared = {**decoded, "class_mean_gradient": scene.class_mean.guess(seen.labels)}
        found = [
            Measured("cosine", mean_cosine(each, seen.gradient).tolist(), {"decoder": kind})
            for kind, each in compared.items()
        ]
        estimates = _amortised(scene, seen, sizes.groups, seed)
        found += _scores(scene, seen, estimates)
        found += _closed_form(scene, seen, seed)
        if seed == 0 and b in SEARCHED_BATCHES and sizes.searched:
            found += _searches(scene, seen, estimates[:, 0], decoded["ridge"], sizes.searched // b)
        return found

    def conclude(self, world: World, table: Table) -> list[str]:
        bad: list[str] = []
        good: list[str] = []
        for route in ("amortised", "attention_rowspace"):
            rows = {int(row.keys["b"]): row for row in table.where("recovered", route=route)}
            chance = 1 / (STRANGERS + 1)
            ahead = [b for b, row in rows.items() if row.low is not None and row.low > chance]
            if rows and not ahead:
                bad.append(f"`{route}` recovers no clearly larger share of images than chance ({chance:.0%}) at any b.")
            elif ahead:
                good.append(
                    f"`{route}` recovers clearly more images than chance ({chance:.0%}) at b = "
                    f"{', '.join(map(str, sorted(ahead)))} of {', '.join(map(str, sorted(rows)))}; at b = {max(ahead)} "
                    f"the share is {rows[max(ahead)].words(2)}."
                )
        rows = {int(row.keys["b"]): row for row in table.where("psnr_db", route="amortised", gradient="update")}
        behind = [b for b, row in rows.items() if not clearly_above(row, table.one("psnr_db", route="class_mean", b=b))]
        if behind:
            bad.append(
                "The amortised estimate is not clearly nearer to the images than their labels' mean images at b = "
                f"{', '.join(map(str, sorted(behind)))}."
            )
        for gradient in ("decoded", "update", "exact"):
            for row in table.where("psnr_db", route="amortised_refined", gradient=gradient):
                start = table.one("psnr_db", route="amortised", gradient="start of the searches", b=row.keys["b"])
                if start is not None:
                    words = f"At b = {row.keys['b']} matching the {NAMES[gradient]} takes the estimate"
                    words += f" from {start.mean:.1f} to {row.words()} dB."
                    (good if row.mean > start.mean else bad).append(words)
        ridge = {int(row.keys["b"]): row for row in table.where("cosine", decoder="ridge")}
        if ridge:
            last = max(ridge)
            words = (
                f"The ridge of single pairs has cosine {ridge[last].words(3)} to the averaged gradient at b = {last}"
            )
            control = table.one("cosine", decoder="class_mean_gradient", b=last)
            words += f", the mean gradient of the true labels {control.words(3)}." if control else "."
            (good if clearly_above(ridge[last], control) else bad).append(words)
        return bad + good


NAMES = {"decoded": "decoded gradient", "update": "update itself", "exact": "exact gradient"}


def _amortised(scene: Scene, seen: Observed, groups: int, seed: int) -> Tensor:
    """Estimates [V, 1 + STRANGERS, b, c, h, w] from every victim's update and from those of its strangers."""
    generator = torch.Generator().manual_seed(seed)
    found, choice = [], None
    for v, labels in enumerate(seen.labels.cpu()):
        strange = draw_groups(scene.strangers.labels, labels, STRANGERS, generator)
        rows = fitting_groups(scene.proxy.labels, labels, groups, generator)
        ridge = GroupRidge(group_mean(scene.single, rows), scene.proxy, rows, choice)
        choice = ridge.choice
        own = {name: update[v : v + 1].flatten(1) for name, update in seen.updates.items()}
        others = group_mean(scene.of_strangers, strange)
        found.append(ridge({name: torch.cat([own[name], others[name]]) for name in own}))
    return torch.stack(found)


def _scores(scene: Scene, seen: Observed, estimates: Tensor) -> list[Measured]:
    """PSNR of the amortised estimates beside controls, and which images it recovers."""
    images = seen.images
    db = torch.stack([_assigned_db(estimates[:, s], images) for s in range(estimates.shape[1])])  # [1 + S, V, b]
    recovered = (db[0] > db[1:].amax(0)).double()
    public = scene.proxy.batch(slice(None), images.device)
    means = {label: public[scene.proxy.labels == label].mean(0) for label in scene.proxy.labels.unique().tolist()}
    mean = public.mean(0)
    of_class = torch.stack([torch.stack([means.get(one, mean) for one in labels]) for labels in seen.labels.tolist()])
    figures = {
        "amortised": db[0],
        "stranger": db[1:].mean(0),
        "class_mean": _assigned_db(of_class, images),
        "mean_image": _assigned_db(mean.expand_as(images), images),
    }
    return [
        *(Measured("psnr_db", _flat(each), {"route": route, "gradient": "update"}) for route, each in figures.items()),
        Measured("recovered", _flat(recovered), {"route": "amortised"}),
        Measured("recovered_a_batch", _flat(recovered.sum(1)), {"route": "amortised"}),
    ]


def _closed_form(scene: Scene, seen: Observed, seed: int) -> list[Measured]:
    """The closed form on the exact gradient of block 0's qkv, if its count allows it, beside strangers' images.

    On an exact gradient the closed form reproduces the image, so a stranger's estimate is the stranger's image itself.
    """
    base, b = scene.target.base, seen.labels.shape[1]
    verdict = count_attention_rowspace(base, b)
    spare = float(verdict.equations - verdict.unknowns)
    found = [Measured("spare_equations", [spare], {"route": "attention_rowspace"})]
    if not verdict.identifiable:
        return found
    db = psnr_db(closed_form(base, seen.gradient), seen.images[:, 0])
    generator = torch.Generator().manual_seed(seed)
    rows = [draw_groups(scene.strangers.labels, label, STRANGERS, generator)[:, 0] for label in seen.labels.cpu()]
    others = scene.strangers.batch(torch.stack(rows, 1).flatten(), base.device).unflatten(0, (-1, len(db)))
    strangers = torch.stack([psnr_db(one, seen.images[:, 0]) for one in others])
    recovered = (db > strangers.amax(0)).double()
    return [
        *found,
        Measured("psnr_db", db.tolist(), {"route": "attention_rowspace", "gradient": "exact"}),
        Measured("psnr_db", strangers.mean(0).tolist(), {"route": "stranger", "gradient": "exact"}),
        Measured("recovered", recovered.tolist(), {"route": "attention_rowspace"}),
        Measured("recovered_a_batch", recovered.tolist(), {"route": "attention_rowspace"}),
    ]


def _searches(scene: Scene, seen: Observed, start: Tensor, decoded: Gradient, victims: int) -> list[Measured]:
    """For the first victims: match the exact gradient, the decoded one or the update, from the amortised estimate."""
    rows = slice(0, victims)
    images, start, labels = seen.images[rows], start[rows], seen.labels[rows]
    updates = {name: each[rows] for name, each in seen.updates.items()}
    objectives: dict[str, Objective] = {
        "exact": GradientObjective(Gradient({n: g[rows] for n, g in seen.gradient.dense.items()})),
        "decoded": GradientObjective(Gradient({n: g[rows] for n, g in decoded.dense.items()})),
        "update": UpdateObjective(scene.target, scene.a, updates),
    }
    public = scene.proxy.batch(slice(None), images.device)
    of_start = {"route": "amortised", "gradient": "start of the searches"}
    found = [Measured("psnr_db", _flat(_assigned_db(start, images)), of_start)]
    for gradient, objective in objectives.items():
        config = AuditConfig().refinement
        result = match(scene.target, objective, start, labels, config, "amortised_refined", "a local search")
        kept = without_foreign_colours(result.images.flatten(0, 1), start.flatten(0, 1), public)
        scores = _flat(_assigned_db(kept.view_as(images), images))
        found.append(Measured("psnr_db", scores, {"route": "amortised_refined", "gradient": gradient}))
    return found


def _assigned_db(estimates: Tensor, originals: Tensor) -> Tensor:
    """PSNR in dB [V, b] of estimates [V, b, c, h, w], each batch assigned to its originals."""
    ordered = assign_groups(estimates.cpu(), originals.cpu())
    return psnr_db(ordered.flatten(0, 1), originals.cpu().flatten(0, 1)).view(originals.shape[:2])


def _flat(values: Tensor) -> list[float]:
    return [float(value) for value in values.flatten()]

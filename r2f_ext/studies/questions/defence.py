"""Study `defence`: what a defence of the adapter takes from the attacker, and what it costs in accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from r2f_ext.audit.assign import assign_groups
from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import ImageSet
from r2f_ext.decoders import Ridge, Updates
from r2f_ext.errors import R2FError
from r2f_ext.pairs import SimulatedPairs, updates_of
from r2f_ext.studies.federated import RATE, Defence, federated_accuracy
from r2f_ext.studies.groups import GroupRidge, draw_groups, fitting_groups, group_mean
from r2f_ext.studies.pairs_in_memory import PairsInMemory
from r2f_ext.studies.scene import ClassMean, base_of, fit_together, mean_cosine, private_images, start_of, victims_of
from r2f_ext.studies.strangers import STRANGERS, clearly_above, public_parts
from r2f_ext.studies.study import Measured, Panel, Setting, Study, World
from r2f_ext.studies.table import Row, Table
from r2f_ext.types import Gradient

NONE = Defence()
# Defences whose clients train alike follow one another, so that the cached training runs once.
DEFENCES: dict[str, dict[str, Defence]] = {
    "clipping and noise": {
        "clipped": Defence(clip=True),
        **{f"noise {noise:g}": Defence(clip=True, noise=noise) for noise in (3e-3, 1e-2, 3e-2, 0.1)},
    },
    "rounding": {name: Defence(rounding=name) for name in ("float16", "bfloat16", "sign")},
    "batch": {f"{batch} images": Defence(batch=batch) for batch in (4, 16)},
    "steps": {f"{steps} steps": Defence(steps=steps) for steps in (2, 4)},
    "dropout": {f"dropout {share:g}": Defence(dropout=share) for share in (0.2, 0.5)},
    "rank": {f"rank {rank}": Defence(rank=rank) for rank in (4, 2, 1)},
    "fewer layers": {"last half": Defence(blocks=0.5), "last block": Defence(blocks=0.0)},
}
ROUND = 16  # images per round, over all its clients, at every batch size


@dataclass(frozen=True)
class Sizes:
    """Numbers per seed: private images, proxies, proxies of the decoder, strangers, groups of a fit, train and test."""

    images: int
    pairs: int
    decoder_pairs: int
    strangers: int
    groups: int
    train: int
    test: int


FULL, QUICK = Sizes(32, 800, 150, 250, 300, 30 * ROUND, 400), Sizes(4, 100, 40, 60, 40, 2 * ROUND, 50)


def public_of(world: World, seed: int) -> list[ImageSet]:
    """The public images of the attack, its strangers, the clients' training and the test of its result.

    Raises:
        R2FError: there are too few, or their labels are random, so that no accuracy can be measured.
    """
    base, data, sizes = base_of(world.base, world.device), world.data[0], world.of(FULL, QUICK)
    parts = public_parts(base, data, seed, (sizes.pairs, sizes.strangers, sizes.train, sizes.test))
    if parts[0].random_labels:
        raise R2FError(
            f"the labels of '{data.proxy}' are random, so that no accuracy can be measured: name labelled images."
        )
    return parts


@dataclass(frozen=True)
class Clients:
    """What clients with one image each would send without a defence: the attacker's own, strangers and victims.

    Attributes:
        public, strangers, private: name -> the change of B, up to its sign [n, d_out, r].
        gradient: the victims' gradients averaged over their steps.
        kept: pairs that decoders are fitted to.
        class_mean: their mean gradients by label.
        bound: the median norm of the attacker's own changes, to which clients clip.
    """

    public: Updates
    strangers: Updates
    private: Updates
    gradient: Gradient
    kept: PairsInMemory
    class_mean: ClassMean
    bound: float


@lru_cache(maxsize=1)
def clients_of(world: World, seed: int, defence: Defence) -> Clients:
    """The clients of one kind of training, `Defence.of_one_image`."""
    base, sizes, training = base_of(world.base, world.device), world.of(FULL, QUICK), defence.training
    target = defence.target(base)
    a, (proxy, strangers, _, _) = start_of(target, seed), public_of(world, seed)
    private = private_images(base, world.data[0], seed, sizes.images)
    pairs = SimulatedPairs(target, a, proxy, training, dense=True)
    kept = PairsInMemory.of(pairs, sizes.decoder_pairs)
    others = SimulatedPairs(target, a, strangers, training, 10_000, dense=True)
    victims = victims_of(target, a, private, training, 20_000)
    rate, class_mean = sum(training.rates()), ClassMean()
    fit_together(kept, sizes.decoder_pairs, [class_mean])
    public, strange, own = (
        {name: rate * update for name, update in updates.items()}
        for updates in (updates_of(pairs), updates_of(others), victims.updates)
    )
    norm = torch.stack([each.flatten(1).square().sum(1) for each in public.values()]).sum(0).sqrt()
    return Clients(public, strange, own, victims.gradient, kept, class_mean, float(norm.quantile(0.5)))


class DefenceStudy(Study):
    """Study `defence`: what an attacker recovers, and the accuracy after training, by defence and strength."""

    name = "defence"
    question = "What does each defence take from an attacker, and what does it cost in accuracy?"
    method = (
        "Clients fine-tune one adapter in rounds (federated averaging) and defend every change of its factors that "
        "they send. Leak and utility are of the same defence at the same strength, but not of the same moment: the "
        "leak is what one client's first change gives away, the utility the accuracy on "
        f"{FULL.test} held-out public images after {FULL.train // ROUND} rounds of {ROUND} images in which every "
        f"client defends itself so (SGD, {RATE:g}, falling linearly over the rounds and shared by the steps of a "
        "client; the scale as 1 / sqrt(r); every image is seen once; the fresh head is frozen; the interval is over "
        f"test images, not over trainings). Victims are clients with one of {FULL.images} private images a seed, "
        "or with a batch of them. The attacker knows the labels and the defence: amortised route and ridge are fitted "
        f"to public changes that were defended alike ({FULL.pairs} and {FULL.decoder_pairs}; for batches the ridge to "
        "those of single images). An image counts as recovered if its estimate is nearer to it than those from each of "
        f"{STRANGERS} strangers, other images with the same labels that were defended alike, as happens by chance to "
        f"{100 / (STRANGERS + 1):.0f} %. Clipping is to the median norm of public changes, and the noise's standard "
        "deviation is a share of that on every entry. `sign` sends one bit an entry. Controls: strangers beside PSNR, "
        "the mean gradient of the true labels beside cosines."
    )
    seeds = 2
    no_controls = (
        "An image counts as recovered by its rank among strangers of its label; the mean images, the nearest proxy and "
        "noise adapters are left to the audit, which has them for every adapter."
    )
    panels = (
        Panel("recovered", "accuracy", ("defence",), title="Leak against utility", y_label="share of images recovered"),
        Panel("cosine", "accuracy", ("defence",), {"decoder": "ridge"}, "Decoder against utility"),
        Panel("recovered", "level", ("defence",), title="Leak by strength", y_label="share of images recovered"),
        Panel("accuracy", "level", ("defence",), title="Utility by strength"),
    )

    def settings(self, world: World) -> list[Setting]:
        """Every defence at every strength; level 0 is no defence, the common start of all curves."""
        names = ["clipping and noise"] if world.quick else list(DEFENCES)
        found: list[Setting] = []
        for name in names:
            strengths = ["none", *DEFENCES[name]]
            found += [{"defence": name, "level": level, "strength": each} for level, each in enumerate(strengths)]
        return found[::2][:2] if world.quick else found

    def measure(self, world: World, setting: Setting, seed: int) -> list[Measured]:
        defence = DEFENCES[str(setting["defence"])].get(str(setting["strength"]), NONE)
        return _measured(world, seed, defence)

    def conclude(self, world: World, table: Table) -> list[str]:
        bad: list[str] = []
        good: list[str] = []
        for name in DEFENCES:
            leak = {int(row.keys["level"]): row for row in table.where("recovered", defence=name)}
            utility = {int(row.keys["level"]): row for row in table.where("accuracy", defence=name)}
            levels = sorted(level for level in leak if level in utility)
            if len(levels) < 2 or levels[0] != 0:
                continue
            each = [f"{leak[n].keys['strength']} {leak[n].words(2)} at {utility[n].mean:.2f}" for n in levels]
            fewer = [n for n in levels if clearly_above(leak[0], leak[n])]
            worse = [n for n in levels if clearly_above(utility[0], utility[n])]
            words = (
                f"{name.capitalize()}, share of images recovered at which accuracy: {'; '.join(each)}. "
                f"Clearly fewer images than undefended: {_names(leak, fewer)}; "
                f"clearly less accuracy: {_names(leak, worse)}."
            )
            (good if fewer else bad).append(words)
        return bad + good


def _names(rows: Mapping[int, Row], levels: Sequence[int]) -> str:
    return ", ".join(str(rows[level].keys["strength"]) for level in levels) or "nowhere"


@lru_cache(maxsize=64)
def _measured(world: World, seed: int, defence: Defence) -> list[Measured]:
    """Leak and utility of one defence. The undefended case, which all curves share, is measured once."""
    sizes, clients = world.of(FULL, QUICK), clients_of(world, seed, defence.of_one_image)
    base = base_of(world.base, world.device)
    proxy, strangers, train, test = public_of(world, seed)
    private = private_images(base, world.data[0], seed, sizes.images)
    count = len(private) // defence.batch
    batches = torch.arange(count * defence.batch).view(count, defence.batch)
    generator = torch.Generator().manual_seed(seed)

    def sent(single: Updates, rows: Tensor) -> Updates:
        return defence(group_mean(single, rows), clients.bound, generator)

    own = sent(clients.private, batches)
    db, choice = [], None
    for v, rows in enumerate(batches):
        labels, images = private.labels[rows], private.batch(rows)
        groups = fitting_groups(proxy.labels, labels, sizes.groups, generator)
        ridge = GroupRidge(sent(clients.public, groups), proxy, groups, choice)
        choice = ridge.choice
        other = sent(clients.strangers, draw_groups(strangers.labels, labels, STRANGERS, generator))
        estimates = ridge({name: torch.cat([own[name][v : v + 1], other[name]]) for name in own}).cpu()
        ordered = assign_groups(estimates, images.expand_as(estimates))
        db.append(psnr_db(ordered.flatten(0, 1), images.repeat(len(ordered), 1, 1, 1)).view(len(ordered), -1))
    scores = torch.cat(db, dim=1)  # [1 + STRANGERS, images]
    recovered = (scores[0] > scores[1:].amax(0)).double()
    accuracy = federated_accuracy(base, defence, train, test, ROUND, clients.bound, seed)
    return [
        Measured("accuracy", accuracy.double().tolist()),
        Measured("recovered", recovered.tolist(), {"route": "amortised"}),
        Measured("psnr_db", scores[0].tolist(), {"route": "amortised"}),
        Measured("psnr_db", scores[1:].mean(0).tolist(), {"route": "stranger"}),
        *_cosines(clients, defence, own, private.labels[batches].to(base.device), batches, generator),
    ]


def _cosines(
    clients: Clients, defence: Defence, own: Updates, labels: Tensor, rows: Tensor, generator: torch.Generator
) -> list[Measured]:
    """Cosines of the ridge fitted to defended changes of single images, and of the mean gradient of the true labels."""
    single = torch.arange(len(clients.kept))[:, None]
    pairs = clients.kept.with_updates(defence(group_mean(clients.public, single), clients.bound, generator))
    ridge = Ridge()
    ridge.fit(pairs, len(pairs))
    true = Gradient(group_mean(clients.gradient.dense, rows))
    means = clients.class_mean.guess(labels)
    return [
        Measured("cosine", mean_cosine(ridge.decode(own), true).tolist(), {"decoder": "ridge"}),
        Measured("cosine", mean_cosine(means, true).tolist(), {"decoder": "class_mean_gradient"}),
    ]

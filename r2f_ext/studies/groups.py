"""The amortised route for batches: kernel ridge from a batch's update to its images, in the order of their labels.

At the start the update of a batch is the mean of the updates of its images. Once the update of every proxy image is
known, the updates of proxy batches therefore need no further passes through the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2f_ext.data import ImageSet
from r2f_ext.decoders import Updates
from r2f_ext.errors import R2FError
from r2f_ext.inversion.amortised import Choice, ImageRegression, kernel_, system_, unit_rows

HELD_OUT = 6  # one group in HELD_OUT is held out to choose the settings


def draw_groups(public: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` groups of public images with the labels [b]: rows [count, b].

    Within a group, no image is drawn twice for one label. If a label has too few images, images of any label are drawn
    for it.

    Args:
        public: labels [N] of the public images.

    Raises:
        R2FError: there are fewer public images than a group needs for one label.
    """
    return _drawn(_pools(public, labels, 1), labels, count, generator)


def fitting_groups(public: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`draw_groups` for a fit: the last sixth of the groups, which choose its settings, share no image with the others.

    With b = 1, every public image of the label is a group, up to `count`.
    """
    pools = _pools(public, labels, HELD_OUT)
    if len(labels) == 1:
        return next(iter(pools.values()))[:count, None]
    cuts = {label: len(pool) - len(pool) // HELD_OUT for label, pool in pools.items()}
    last = max(1, count // HELD_OUT)
    fitted = _drawn({label: pool[: cuts[label]] for label, pool in pools.items()}, labels, count - last, generator)
    chosen = _drawn({label: pool[cuts[label] :] for label, pool in pools.items()}, labels, last, generator)
    return torch.cat([fitted, chosen])


def _pools(public: Tensor, labels: Tensor, share: int) -> dict[int, Tensor]:
    """Label -> the rows of its images, or all rows if it has fewer than `share` times the images that a group needs."""
    pools = {}
    for label, times in zip(*labels.unique(return_counts=True), strict=True):
        own = torch.nonzero(public == label).flatten()
        pools[int(label)] = own if len(own) >= share * times else torch.arange(len(public))
        if len(pools[int(label)]) < share * times:
            raise R2FError(
                f"{len(public)} public images are too few for batches with {int(times)} images of one label: at least "
                f"{share * int(times)} are needed."
            )
    return pools


def _drawn(pools: dict[int, Tensor], labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    rows = torch.empty(count, len(labels), dtype=torch.int64)
    for label, pool in pools.items():
        slots = torch.nonzero(labels == label).flatten()
        rows[:, slots] = pool[torch.rand(count, len(pool), generator=generator).argsort(1)[:, : len(slots)]]
    return rows


def group_mean(single: Updates, rows: Tensor) -> Updates:
    """name -> updates [n, ...] of n groups: the means of the single updates [N, ...] in the rows [n, b]."""
    found = {}
    for name, each in single.items():
        total = each[rows[:, 0]]
        for slot in rows[:, 1:].unbind(1):
            total += each[slot]
        found[name] = total / rows.shape[1]
    return found


class GroupRidge:
    """Kernel ridge from the updates of groups to their images, one image a slot.

    Args:
        updates: name -> the updates of n groups of public images [n, ...].
        public: these images.
        rows: which of them are in which group [n, b], see `fitting_groups`.
        choice: kernel width and ridge; None: those with the best PSNR on the first slot of held-out groups.
    """

    def __init__(self, updates: Updates, public: ImageSet, rows: Tensor, choice: Choice | None = None) -> None:
        self.public, self.rows = public, rows
        self.units = {name: unit_rows(each) for name, each in updates.items()}
        cosine = torch.stack([unit @ unit.mT for unit in self.units.values()]).mean(0)
        if choice is None:
            first = self._images(0)
            choice = ImageRegression(cosine.clone(), first, first.shape[1]).choice
        self.choice = choice
        self.system = system_(cosine, choice)

    def __call__(self, updates: Updates) -> Tensor:
        """name -> updates [V, ...] -> images [V, b, c, h, w]."""
        cosine = torch.stack([unit_rows(updates[n]) @ unit.mT for n, unit in self.units.items()]).mean(0)
        weights = self.system.solve(kernel_(cosine, self.choice.gamma).mT).mT
        found = []
        for slot in range(self.rows.shape[1]):
            images = self._images(slot)
            mean = images.mean(0)
            found.append(weights @ (images - mean) + mean)
        return torch.stack(found, 1).clamp(0, 1).unflatten(2, self.public.images.shape[1:])

    def _images(self, slot: int) -> Tensor:
        return self.public.batch(self.rows[:, slot], next(iter(self.units.values())).device).flatten(1)

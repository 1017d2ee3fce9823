"""Strangers (adapters of public images with the victims' labels), and how near estimates come to the originals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import ImageSet
from r2f_ext.decoders import Updates
from r2f_ext.errors import R2FError
from r2f_ext.pairs import PairSource
from r2f_ext.studies.scene import public_images
from r2f_ext.studies.study import Data
from r2f_ext.studies.table import Row
from r2f_ext.types import BaseModel, FactoredGradient, PairBatch

STRANGERS = 19  # per victim; by chance the victim's own estimate is better than all of theirs once in 20


def public_parts(base: BaseModel, data: Data, seed: int, sizes: tuple[int, ...]) -> list[ImageSet]:
    """Split the public images of one seed into disjoint parts of these sizes: proxies, strangers, further images.

    Raises:
        R2FError: the public set has too few images.
    """
    public = public_images(base, data, seed, sum(sizes))
    if len(public) < sum(sizes):
        raise R2FError(f"'{data.proxy}' has {len(public)} public images and {sum(sizes)} are needed: add images.")
    return [public.take(rows) for rows in torch.arange(sum(sizes)).split(list(sizes))]


def joined(first: ImageSet, second: ImageSet) -> ImageSet:
    """The images of both, those of `first` before those of `second`."""
    images, labels = torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels])
    return replace(first, images=images, labels=labels)


def nearest_db(estimates: Tensor, originals: Tensor) -> Tensor:
    """PSNR in dB [V] of each victim's estimate [V, c, h, w] against the nearest of its n images [V, n, c, h, w]."""
    return torch.stack([psnr_db(estimates, one) for one in originals.unbind(1)]).amax(0)


class WrittenPairs:
    """The first pairs of a source, kept in memory with dense gradients: for pairs that take long to make.

    A pair of the embedded base with all its layers takes 2.1 MB, however many steps made it.
    """

    def __init__(self, pairs: PairSource, count: int) -> None:
        self.target, self.a, self.one_step, self.per_victim_a = pairs.target, pairs.a, pairs.one_step, False
        self.group_size = pairs.group_size
        batches = list(pairs.batches(0, count))
        names = pairs.target.names
        self.updates = {name: torch.cat([batch.updates[name] for batch in batches]) for name in names}
        self.dense = {name: torch.cat([batch.gradients.dense(name) for batch in batches]) for name in names}
        self.images = torch.cat([batch.images for batch in batches])
        self.labels = torch.cat([batch.labels for batch in batches])

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        """The pairs `start` to `stop`, as one batch."""
        rows = slice(start, stop)
        updates, dense = ({name: each[rows] for name, each in of.items()} for of in (self.updates, self.dense))
        yield PairBatch(updates, FactoredGradient.of_dense(dense), self.images[rows], self.labels[rows])

    def with_updates(self, updates: Updates) -> WrittenPairs:
        """The same pairs with other updates, name -> [n, d_out, r]."""
        found = copy.copy(self)
        found.updates = updates
        return found


def clearly_above(one: Row | None, other: Row | None) -> bool:
    """Whether both rows have intervals and that of `one` lies above that of `other`."""
    if one is None or other is None or one.low is None or other.high is None:
        return False
    return one.low > other.high

"""Strangers (adapters of public images with the victims' labels), and how near estimates come to the originals."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import ImageSet
from r2f_ext.studies.scene import public_images
from r2f_ext.studies.study import Data
from r2f_ext.studies.table import Row
from r2f_ext.types import BaseModel

STRANGERS = 19  # per victim: a useless estimate is nearer to the image than all theirs in 1 of 20 cases, by chance


def public_parts(base: BaseModel, data: Data, seed: int, sizes: tuple[int, ...]) -> list[ImageSet]:
    """Split the public images of one seed into disjoint parts of these sizes: proxies, strangers, further images.

    Raises:
        R2FError: the public set has too few images.
    """
    public = public_images(base, data, seed, sum(sizes), least=sum(sizes))
    return [public.take(rows) for rows in torch.arange(sum(sizes)).split(list(sizes))]


def joined(first: ImageSet, second: ImageSet) -> ImageSet:
    """The images of both, those of `first` before those of `second`."""
    images, labels = torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels])
    return replace(first, images=images, labels=labels)


def nearest_db(estimates: Tensor, originals: Tensor) -> Tensor:
    """PSNR in dB [V] of each victim's estimate [V, c, h, w] against the nearest of its n images [V, n, c, h, w]."""
    return torch.stack([psnr_db(estimates, one) for one in originals.unbind(1)]).amax(0)


def clearly_above(one: Row | None, other: Row | None) -> bool:
    """Whether both rows have intervals and that of `one` lies above that of `other`."""
    if one is None or other is None or one.low is None or other.high is None:
        return False
    return one.low > other.high

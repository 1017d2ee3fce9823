"""Public images near an estimate, on which a second kernel ridge is fitted (docs/methods.md, 3d).

Hundreds of thousands of candidates can be compared with an estimate in pixel space, which takes no pass of the model;
pairs are made only of the nearest. Regression on samples near the observation is the regression adjustment of
approximate Bayesian computation (Beaumont, Zhang and Balding, Genetics 162, 2002). There the samples are near in what
is observed, here in what a first regression makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.data import ProceduralStream, ProxyImages
from r2f_ext.types import BaseModel

GENERATED = 1 << 18  # images of 3 x 32 x 32 that are generated as candidates; of larger ones fewer, for the same time
CHUNK = 8192  # candidates that are compared at a time
SHIFT = 1  # pixels by which variants of an image are shifted, in each direction
GAINS = (0.8, 1.3)  # range of the factor on the pixels of a variant
VARIANTS = 2 * (2 * SHIFT + 1) ** 2  # of one image, itself included


def near_images(candidates: Iterable[Tensor], estimates: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """The candidates nearest to each of V estimates.

    Args:
        candidates: chunks of images, uint8 [n, c, h, w].
        estimates: [V, c, h, w] in [0, 1]; each: how many for each, or all candidates if there are fewer.

    Returns:
        Images uint8 [m, c, h, w] on the CPU, without repetition, and int64 [V, each]: those of each estimate.
    """
    points, seen = estimates.flatten(1), 0
    least = points.new_empty(len(points), 0)
    numbers = torch.empty(len(points), 0, dtype=torch.int64)
    kept, images = torch.empty(0, dtype=torch.int64), torch.empty(0, *estimates.shape[1:], dtype=torch.uint8)
    for chunk in candidates:
        distances = torch.cdist(points, chunk.to(points).flatten(1) / 255)
        new = torch.arange(seen, seen + len(chunk))
        least, places = torch.cat([least, distances], 1).topk(min(each, least.shape[1] + len(chunk)), largest=False)
        numbers = torch.cat([numbers, new.expand(len(points), -1)], 1).gather(1, places.cpu())
        chosen = numbers.unique()
        images = torch.cat([images, chunk.cpu()])[torch.searchsorted(torch.cat([kept, new]), chosen)]
        kept, seen = chosen, seen + len(chunk)
    return images, torch.searchsorted(kept, numbers)


def generated_nearby(base: BaseModel, seed: int) -> ProceduralStream:
    """Generated images at a base's input size that serve as candidates."""
    count = GENERATED * 3 * 32 * 32 // max(3 * 32 * 32, prod(base.input_shape))
    return ProceduralStream(count, base.input_shape, base.num_classes, seed, base.device)


def streamed(images: ProxyImages) -> Iterator[Tensor]:
    """Images in chunks, uint8 [n, c, h, w]."""
    for first in range(0, len(images), CHUNK):
        yield images.batch(slice(first, first + CHUNK)).mul_(255).round_().to(torch.uint8)


def variants(images: Tensor) -> Iterator[Tensor]:
    """Images uint8 [n, c, h, w] in chunks: as they are, then flipped, shifted by up to SHIFT pixels, and both.

    A shifted image repeats its border. Each variant has a random gain, the same ones in every call.
    """
    generator, shifts = torch.Generator().manual_seed(0), sorted(range(-SHIFT, SHIFT + 1), key=abs)
    for flip, down, right in product((False, True), shifts, shifts):
        for chunk in images.split(CHUNK):
            if not (flip or down or right):
                yield chunk
                continue
            gains = GAINS[0] + (GAINS[1] - GAINS[0]) * torch.rand(len(chunk), 1, 1, 1, generator=generator)
            moved = _moved(chunk.flip(3) if flip else chunk, down, right)
            yield (gains * moved).clamp_(0, 255).round_().to(torch.uint8)


def _moved(images: Tensor, down: int, right: int) -> Tensor:
    """The images [n, c, h, w] shifted, as floats; the border is repeated."""
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (SHIFT, SHIFT, SHIFT, SHIFT), mode="replicate")
    return padded[:, :, SHIFT - down : SHIFT - down + height, SHIFT - right : SHIFT - right + width]

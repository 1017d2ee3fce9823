"""Public images near an estimate, on which a second kernel ridge is fitted (docs/methods.md, 3d).

Hundreds of thousands of candidates can be compared with an estimate in pixel space, which takes no pass of the model;
pairs are made only of the nearest. Regression on samples near the observation is the regression adjustment of
approximate Bayesian computation (Beaumont, Zhang and Balding, Genetics 162, 2002). There the samples are near in what
is observed, here in what a first regression makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.data import ProceduralStream, ProxyImages
from r2f_ext.types import BaseModel

SMALL = 3 * 32 * 32  # numbers of an image
GENERATED = 1 << 18  # images of that size that are generated as candidates; of larger ones fewer, for the same time
CHUNK = 8192  # images of that size that are compared at a time
SHIFT = 1  # pixels by which variants of an image are shifted, in each direction
GAINS = (0.8, 1.3)  # range of the factor on the pixels of a variant
VARIANTS = 2 * (2 * SHIFT + 1) ** 2  # of one image, itself included


def near_images(candidates: Iterable[Tensor], estimates: Tensor, counts: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The candidates nearest to each of V estimates, by the distance of their pixels.

    Args:
        candidates: chunks of images, uint8 [n, c, h, w].
        estimates: [V, c, h, w] in [0, 1]; counts: int64 [V], how many for each. If there are fewer, it gets all.

    Returns:
        The images that are near any estimate, uint8 [m, c, h, w] on the CPU, and those of each estimate, the nearest
        first: int64 [count].
    """
    points, seen, most = estimates.flatten(1), 0, int(counts.max())
    least = points.new_empty(len(points), 0)
    numbers, kept = torch.empty(len(points), 0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    images = torch.empty(0, *estimates.shape[1:], dtype=torch.uint8)
    for chunk in candidates:
        distances = torch.cdist(points, (chunk.to(points.device) / 255).to(points.dtype).flatten(1))
        new = torch.arange(seen, seen + len(chunk))
        least, places = torch.cat([least, distances], 1).topk(min(most, least.shape[1] + len(chunk)), largest=False)
        numbers = torch.cat([numbers, new.expand(len(points), -1)], 1).gather(1, places.cpu())
        chosen = numbers[torch.arange(numbers.shape[1]) < counts[:, None]].unique()
        images = torch.cat([images, chunk.cpu()])[torch.searchsorted(torch.cat([kept, new]), chosen)]
        kept, seen = chosen, seen + len(chunk)
    own = zip(numbers, counts.tolist(), strict=True)
    return images, [torch.searchsorted(kept, row[:count].contiguous()) for row, count in own]


def generated_nearby(base: BaseModel, proxy: str, seed: int = 0) -> ProceduralStream | None:
    """Generated images at a base's input size that serve as candidates; None if the proxy of this name is another."""
    if proxy != ProceduralStream.name:
        return None
    count = GENERATED * SMALL // max(SMALL, prod(base.input_shape))
    return ProceduralStream(count, base.input_shape, base.num_classes, seed, base.device)


def streamed(images: ProxyImages, shape: Sequence[int]) -> Iterator[Tensor]:
    """Images of shape (c, h, w) in chunks, uint8 [n, c, h, w]."""
    size = _chunk(shape)
    for first in range(0, len(images), size):
        yield images.batch(slice(first, first + size)).mul_(255).round_().to(torch.uint8)


def variants(images: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """The rows int64 [m] of images uint8 [n, c, h, w], in chunks: as they are, then flipped, shifted by up to SHIFT
    pixels, and both.

    A shifted image repeats its border. Each variant has a random gain, the same ones in every call.
    """
    generator, shifts = torch.Generator().manual_seed(0), sorted(range(-SHIFT, SHIFT + 1), key=abs)
    for flip, down, right in product((False, True), shifts, shifts):
        for chunk in (images[part] for part in rows.split(_chunk(images.shape[1:]))):
            if not (flip or down or right):
                yield chunk
                continue
            gains = GAINS[0] + (GAINS[1] - GAINS[0]) * torch.rand(len(chunk), 1, 1, 1, generator=generator)
            moved = _moved(chunk.flip(3) if flip else chunk, down, right)
            yield (gains * moved).clamp_(0, 255).round_().to(torch.uint8)


def _chunk(shape: Sequence[int]) -> int:
    """How many images of shape (c, h, w) are compared at a time: as many numbers for any shape."""
    return max(1, CHUNK * SMALL // max(SMALL, prod(shape)))


def _moved(images: Tensor, down: int, right: int) -> Tensor:
    """The images [n, c, h, w] shifted, as floats; the border is repeated."""
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (SHIFT, SHIFT, SHIFT, SHIFT), mode="replicate")
    return padded[:, :, SHIFT - down : SHIFT - down + height, SHIFT - right : SHIFT - right + width]

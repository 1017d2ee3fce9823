"""Faces and photographs from the scikit-image wheel, read at run time without a download."""

from __future__ import annotations

import math

import numpy as np
import skimage.data
import torch
from torch import Tensor

from r2f_ext.data.image_set import fit_images
from r2f_ext.errors import R2FError

# The two lists share no photograph, so no private crop overlaps a proxy crop.
PROXY_PHOTOS = (
    "brick",
    "camera",
    "cell",
    "clock",
    "coins",
    "grass",
    "gravel",
    "immunohistochemistry",
    "moon",
    "page",
    "text",
)
PRIVATE_PHOTOS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
FACES = 100
MIN_DEVIATION = 0.03
_TRIES = 20


def load_faces() -> Tensor:
    """The 100 faces of `skimage.data.lfw_subset()`, uint8 [100, 1, 25, 25].

    Raises:
        R2FError: this scikit-image does not have them in its wheel.
    """
    faces = np.asarray(_from_skimage("lfw_subset"))[:FACES]
    return torch.from_numpy((faces * 255).round().astype(np.uint8))[:, None]


def photo_crops(names: tuple[str, ...], count: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Square crops of random photographs at random places and sizes, half of them mirrored: uint8 [count, *shape].

    The first k crops do not depend on `count`. Nearly uniform crops are replaced by new draws.

    Raises:
        R2FError: this scikit-image lacks one of the photographs.
    """
    photos = [_photo(name) for name in names]
    rng = np.random.default_rng([seed, 0xC0])
    out = torch.empty((count, *shape), dtype=torch.uint8)
    for row in range(count):
        for _ in range(_TRIES):
            out[row] = fit_images(_crop(rng, photos[rng.integers(len(photos))], min(shape[1:])), shape)[0]
            if out[row].float().std() > MIN_DEVIATION * 255:
                break
    return out


def _crop(rng: np.random.Generator, photo: Tensor, smallest: int) -> Tensor:
    """A square of uint8 [1, c, h, w], side log-uniform from `smallest` to the whole photograph."""
    height, width = photo.shape[-2:]
    largest = min(height, width)
    side = min(largest, int(math.exp(rng.uniform(math.log(min(smallest, largest)), math.log(largest)))))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    crop = photo[:, :, top : top + side, left : left + side]
    return crop.flip(-1) if rng.random() < 0.5 else crop


def _photo(name: str) -> Tensor:
    pixels = np.asarray(_from_skimage(name))
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return torch.from_numpy(pixels[..., :3].copy()).permute(2, 0, 1)[None]


def _from_skimage(name: str) -> np.ndarray:
    try:
        return getattr(skimage.data, name)()
    except Exception as error:  # AttributeError, ModuleNotFoundError (pooch) or an error of its downloader, by version
        raise R2FError(
            f"this scikit-image has no '{name}' in its wheel ({type(error).__name__}): install scikit-image 0.22 "
            f"or newer, or use another image set."
        ) from error

"""Image files of noise, and what every loaded set is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from r2f_ext.data import ImageSet


def paint(path: Path, value: int = 100, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    """Write an image file of noise, seeded by `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(value)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def check(loaded: ImageSet, n: int, shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10) -> None:
    assert loaded.images.shape == (n, *shape) and loaded.images.dtype == torch.uint8
    assert loaded.labels.shape == (n,) and loaded.labels.dtype == torch.int64
    assert int(loaded.labels.min()) >= 0 and int(loaded.labels.max()) < num_classes

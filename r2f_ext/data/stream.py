"""Procedural images generated on demand, in constant memory."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from r2f_ext.data.device import as_floats
from r2f_ext.data.procedural import chunk_of, chunk_size, procedural_images, procedural_labels

CACHED_CHUNKS = 2  # a batch may span two chunks


class ProxyImages(Protocol):
    """The images from which pairs are made: an ImageSet or a stream."""

    @property
    def name(self) -> str:
        """What the images are, for reports."""
        ...

    @property
    def labels(self) -> Tensor:
        """int64 [n]."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines images and labels."""
        ...

    def __len__(self) -> int:
        """n."""
        ...

    def batch(self, indices: slice, device: str | torch.device | None = None) -> Tensor:
        """The images of a slice as float32 [n, c, h, w] in [0, 1], on `device` (None: where they are)."""
        ...


class ProceduralStream:
    """Procedural images and labels as a proxy, generated a chunk at a time.

    On a CPU the images are those of `load_images("procedural", ...)`. On a GPU they are made from the GPU's own random
    numbers: different images of the same kind, which the same seed reproduces on the same model of GPU.

    Args:
        count: number of images.
        shape: (c, h, w).
        num_classes: labels are uniform in [0, num_classes).
        seed: determines images and labels.
        device: where the images are made, and where `batch` gives them.

    Raises:
        R2FError: the seed is negative, or the shape is not that of an image.
    """

    name = "procedural"

    def __init__(
        self,
        count: int,
        shape: tuple[int, int, int],
        num_classes: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        procedural_images(count=0, shape=shape, seed=seed)  # raises R2FError for a bad shape or seed
        self.count, self.shape, self.num_classes, self.seed = count, shape, num_classes, seed
        self.device = torch.device(device)
        self.labels = procedural_labels(count, num_classes, seed).to(self.device)
        self._chunks: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.count

    @property
    def fingerprint(self) -> str:
        made = f"procedural/{self.shape}/{self.num_classes}/{self.seed}/{self.count}"
        if self.device.type == "cuda":  # its random numbers differ, and depend on the model of GPU
            made += f"/{torch.cuda.get_device_name(self.device)}"
        return hashlib.sha256(made.encode()).hexdigest()

    def batch(self, indices: slice, device: str | torch.device | None = None) -> Tensor:
        first, stop, step = indices.indices(self.count)
        size = chunk_size(self.shape, self.device.type == "cuda")
        chunks = range(first // size, -(-stop // size))
        parts = [self._chunk(i)[max(first - i * size, 0) : stop - i * size] for i in chunks]
        return as_floats(torch.cat(parts)[::step], device)

    def _chunk(self, index: int) -> Tensor:
        if index not in self._chunks:
            while len(self._chunks) >= CACHED_CHUNKS:
                self._chunks.pop(next(iter(self._chunks)))
            self._chunks[index] = chunk_of(index, self.shape, self.seed, self.device)
        return self._chunks[index]

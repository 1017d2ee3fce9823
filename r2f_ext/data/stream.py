"""Procedural images made as they are asked for: any number of them takes the memory of a few hundred."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from r2f_ext.data.procedural import chunk_of, chunk_size, procedural_images, procedural_labels

CHUNKS_KEPT = 2  # batches in order may straddle two


class ProxyImages(Protocol):
    """What pairs are made from: an ImageSet, or a stream of as many images."""

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
        """SHA-256 of all that decides images and labels."""
        ...

    def __len__(self) -> int:
        """n."""
        ...

    def batch(self, indices: Tensor) -> Tensor:
        """The images at `indices` as float32 [len(indices), c, h, w] in [0, 1]."""
        ...


class ProceduralStream:
    """The images and labels of `load_images("procedural", ...)` as a proxy, a chunk at a time.

    Args:
        count: how many; shape: (c, h, w); num_classes: labels are uniform below it; seed: of all of it.

    Raises:
        R2FError: a negative seed, or a shape that is not an image's.
    """

    name = "procedural"

    def __init__(self, count: int, shape: tuple[int, int, int], num_classes: int, seed: int = 0) -> None:
        procedural_images(count=0, shape=shape, seed=seed)  # refuses what cannot be made
        self.count, self.shape, self.num_classes, self.seed = count, shape, num_classes, seed
        self.labels = procedural_labels(count, num_classes, seed)
        self._chunks: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.count

    @property
    def fingerprint(self) -> str:
        made = f"procedural/{self.shape}/{self.num_classes}/{self.seed}/{self.count}"
        return hashlib.sha256(made.encode()).hexdigest()

    def batch(self, indices: Tensor) -> Tensor:
        size = chunk_size(self.shape)
        out = torch.empty(len(indices), *self.shape)
        for index in torch.unique(indices // size).tolist():
            rows = torch.nonzero(indices // size == index).flatten()
            out[rows] = self._chunk(index)[indices[rows] % size].float().div_(255)
        return out

    def _chunk(self, index: int) -> Tensor:
        if index not in self._chunks:
            while len(self._chunks) >= CHUNKS_KEPT:
                self._chunks.pop(next(iter(self._chunks)))
            self._chunks[index] = chunk_of(index, self.shape, self.seed)
        return self._chunks[index]

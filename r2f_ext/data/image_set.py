"""Labelled images at a model's input size, and the checks that keep private images out of a proxy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.data.device import as_floats
from r2f_ext.errors import R2FError
from r2f_ext.files import sha256_of

MAX_BYTES = 4 << 30
# Rec. 601 luma, as in Pillow's mode "L".
LUMA = (0.299, 0.587, 0.114)
_RESIZE_PIXELS = 1 << 24


@dataclass(frozen=True)
class ImageSet:
    """Images stored as bytes; `batch` converts a batch to floats.

    Attributes:
        name: what the images are, for reports.
        images: uint8 [n, c, h, w].
        labels: int64 [n].
        notes: sentences that a report repeats, such as: fewer images than asked for, folded or random labels.
        random_labels: the labels are independent of the images, so that any other label is as good.
        labels_known: every label is that of its image; False where some were drawn at random.
        in_order: the user named these images one by one, in the order of the adapters.
    """

    name: str
    images: Tensor
    labels: Tensor
    notes: tuple[str, ...] = ()
    random_labels: bool = False
    labels_known: bool = True
    in_order: bool = False

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 [n, c, h, w], got {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError("every image needs one label")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the images and labels."""
        return sha256_of([self.images, self.labels])

    def batch(self, indices: Tensor | list[int] | slice, device: str | torch.device | None = None) -> Tensor:
        """The images at `indices` as float32 [len(indices), c, h, w] in [0, 1]."""
        return as_floats(self.images[indices], device)

    def take(self, indices: Tensor) -> ImageSet:
        """The rows at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def relabelled(self, label: int) -> ImageSet:
        """The same images, all labelled `label`."""
        return replace(self, labels=torch.full_like(self.labels, label))

    def noted(self, *notes: str) -> ImageSet:
        """The same set with more notes."""
        return replace(self, notes=self.notes + notes)


def content_hashes(images: Tensor) -> list[str]:
    """SHA-256 of the raw bytes of each image of uint8 [n, ...], as n hex strings.

    Raises:
        ValueError: the images are not uint8; then equal pixels need not have equal bytes.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"content hashes need uint8 images, got {images.dtype}")
    rows = images.cpu().contiguous().flatten(1).numpy()
    return [hashlib.sha256(row.data).hexdigest() for row in rows]


def unseen_rows(images: Tensor, private: Tensor) -> Tensor:
    """Indices int64 of the rows of `images` that equal no row of `private` (uint8, the same trailing shape)."""
    secret = set(content_hashes(private))
    return torch.tensor([i for i, h in enumerate(content_hashes(images)) if h not in secret], dtype=torch.int64)


def drop_private(proxy: ImageSet, private: ImageSet) -> ImageSet:
    """Return `proxy` without the images that are also in `private`, with a note if there were any.

    Raises:
        R2FError: the sets differ in image shape, or fewer than 2 proxy images are left.
    """
    if proxy.images.shape[1:] != private.images.shape[1:]:
        raise R2FError(f"'{proxy.name}' and '{private.name}' differ in image shape: load both for one model.")
    rows = unseen_rows(proxy.images, private.images)
    if len(rows) < 2:
        raise R2FError(f"a proxy needs at least 2 images that are not private, but '{proxy.name}' has {len(rows)}.")
    dropped = len(proxy) - len(rows)
    if not dropped:
        return proxy
    return proxy.take(rows).noted(f"{dropped} images of '{proxy.name}' were private ones and were removed.")


def fit_images(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Bring uint8 [n, 1 or 3, h, w] to `shape` (c, h, w).

    28x28 images are zero-padded to 32x32, as in the pretraining of the embedded model. Other sizes are scaled
    (bilinear, antialiased) to cover the target and cropped in the centre. Gray images are repeated to 3 channels;
    colour images become luma for 1 channel.

    Raises:
        R2FError: the result would not fit in 4 GiB.
    """
    channels, height, width = shape
    if len(images) * channels * height * width > MAX_BYTES:
        raise R2FError(f"{len(images)} images of {height}x{width} need more than 4 GiB: pass a smaller count.")
    if images.shape[-2:] == (28, 28) and (height, width) == (32, 32):
        images = F.pad(images, (2, 2, 2, 2))
    step = max(1, _RESIZE_PIXELS // max(height * width, images[0].numel() if len(images) else 1))
    parts = [_fit_part(part, shape) for part in images.split(step)] or [images.new_empty(0, channels, height, width)]
    return torch.cat(parts)


def _fit_part(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    if images.shape[1] == 3 and channels == 1:
        weights = torch.tensor(LUMA).view(1, 3, 1, 1)
        images = (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
    if images.shape[-2:] != (height, width):
        images = _cover(images, height, width)
    return images.expand(-1, channels, -1, -1).contiguous()


def _cover(images: Tensor, height: int, width: int) -> Tensor:
    scale = max(height / images.shape[-2], width / images.shape[-1])
    size = (max(height, round(images.shape[-2] * scale)), max(width, round(images.shape[-1] * scale)))
    resized = F.interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resized[:, :, top : top + height, left : left + width].clamp(0, 255).round().to(torch.uint8)

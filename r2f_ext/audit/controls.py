"""Control images for comparison (docs/protocol.md); a method that is no better than these recovers nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r2f_ext.data import ImageSet


@dataclass(frozen=True)
class Controls:
    """For each control, its images for n victims, [n, c, h, w] in [0, 1]."""

    mean_image: Tensor
    class_mean: Tensor
    nearest_proxy: Tensor
    shuffled_adapter: Tensor

    def items(self) -> dict[str, Tensor]:
        return dict(vars(self))


def make_controls(proxy: ImageSet, labels: Tensor, reconstruction: Tensor, shuffled: Tensor) -> Controls:
    """Controls for n victims.

    Args:
        proxy: the public images.
        labels: [n] true labels of the private images, for the class mean.
        reconstruction: [n, c, h, w]; its nearest proxy image shows whether the route only returns a proxy.
        shuffled: [n, c, h, w], the same route fed with another victim's adapter.
    """
    images = proxy.batch(slice(None))
    mean = images.mean(0)
    classes = torch.stack([_mean_of(images[proxy.labels == label], mean) for label in labels])
    nearest = images[torch.cdist(reconstruction.flatten(1).cpu(), images.flatten(1)).argmin(1)]
    return Controls(mean.expand(len(labels), -1, -1, -1), classes, nearest, shuffled.cpu())


def _mean_of(images: Tensor, fallback: Tensor) -> Tensor:
    return images.mean(0) if len(images) else fallback

"""Asynchronous copies to a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; copied from the host through pinned memory, so that the host need not wait for the
    GPU."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def as_floats(images: Tensor, device: str | torch.device | None = None) -> Tensor:
    """uint8 images as float32 in [0, 1] on the device (None: their own). The bytes are copied, and divided there."""
    there = images if device is None else to_device(images, torch.device(device))
    return there.float().div_(255)

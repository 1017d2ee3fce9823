"""How many samples fit into one pass through a base.

The number depends only on the model and the device, not on the current load of the machine: a resumed run makes the
same batches, and therefore the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.types import Target

CPU_BYTES = 1 << 30  # of one pass; the factors that victims of many steps save may take as much again
GPU_FRACTION = 0.4  # of the GPU's total memory


@dataclass(frozen=True)
class SampleBytes:
    """Bytes per sample: `in_pass` during its forward and backward, `factors` for x and delta of all layers, and
    `stored` for these in bfloat16, as files have them."""

    in_pass: int
    factors: int

    @property
    def stored(self) -> int:
        return self.factors // 2


def sample_bytes(target: Target) -> SampleBytes:
    """Count in one pass over one sample: all that autograd saves for the backward, and the captured factors."""
    base = target.base
    like = next(base.model.parameters())
    parameters = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(tensor: Any) -> Any:
        return tensor

    image = like.new_full((1, 1, *base.input_shape), 0.5)
    with Capture(target) as capture, torch.autograd.graph.saved_tensors_hooks(count, unpack):
        found = capture(image, torch.zeros(1, 1, dtype=torch.int64, device=like.device))
    factors = sum(t.numel() * t.element_size() for part in (found.x, found.delta) for t in part.values())
    return SampleBytes(sum(saved.values()) + factors, factors)


def budget(device: torch.device) -> int:
    """Bytes that one pass may take on this device; also the limit for data that is kept over several passes."""
    if device.type == "cuda":
        return int(GPU_FRACTION * torch.cuda.get_device_properties(device).total_memory)
    return CPU_BYTES

"""How many samples may go through a base in one pass: few enough for memory, the same number on every run.

The number must not depend on what else the machine does: a run that goes on after a cut makes the same batches, and so
the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.types import Target

CPU_BYTES = 1 << 30  # of one pass, and as much again for what is kept of many steps
GPU_SHARE = 0.25  # of the GPU's whole memory


@dataclass(frozen=True)
class SampleBytes:
    """What one sample costs: `in_pass` while its forward and backward run, `factors` for x and delta of all layers."""

    in_pass: int
    factors: int


def sample_bytes(target: Target) -> SampleBytes:
    """Count by one pass over one sample: all that autograd keeps for the backward, and the captured factors."""
    base = target.base
    like = next(base.model.parameters())
    parameters = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def give_back(tensor: Any) -> Any:
        return tensor

    image = like.new_full((1, 1, *base.input_shape), 0.5)
    with Capture(target) as capture, torch.autograd.graph.saved_tensors_hooks(count, give_back):
        found = capture(image, torch.zeros(1, 1, dtype=torch.int64, device=like.device))
    factors = sum(t.numel() * t.element_size() for part in (found.x, found.delta) for t in part.values())
    return SampleBytes(sum(kept.values()) + factors, factors)


def budget(device: torch.device) -> int:
    """Bytes that one pass may take."""
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return CPU_BYTES

"""What a GPU needs and a CPU does not notice: float32 that is float32, random states of all devices, its own memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


@contextmanager
def float32_products(tf32: bool = False) -> Iterator[None]:
    """In this context, or decorated function, float32 products and convolutions both use TF32's 11 bits, or neither.

    PyTorch's defaults for the two differ: convolutions, such as a patch embedding, are computed in TF32 on a GPU. An
    error of 3e-4 in a slope or a Jacobian makes searches slow and bounds of their errors wrong.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """In this context PyTorch draws from `seed` on every device; afterwards every device draws as before."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


def free_memory(device: torch.device) -> int:
    """Bytes that are free now: of the GPU, with what PyTorch's allocator holds in reserve, or of the system."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve

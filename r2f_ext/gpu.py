"""What a GPU needs and a CPU does not notice: float32 that is float32, random states of all devices, its own memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


@contextmanager
def float32_products(tf32: bool = False) -> Iterator[None]:
    """In this context, or decorated function, float32 products and convolutions both use TF32's 11 bits, or neither.

    PyTorch's defaults for the two differ: convolutions, such as a patch embedding, may be computed in TF32 on a GPU.
    Its rounding, up to 5e-4, is far above that of float32, for which searches and bounds of their errors are made.
    Without a GPU nothing is changed.
    """
    if not torch.cuda.is_available():
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kinds = matmul, cudnn.conv, cudnn.rnn  # type: ignore[attr-defined]
    before, by_flag = [kind.fp32_precision for kind in kinds], _flags()
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32  # sets the newer `fp32_precision` too
        yield
    finally:
        if by_flag is not None:
            torch.set_float32_matmul_precision(by_flag[0])
            cudnn.allow_tf32 = by_flag[1]
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def _flags() -> tuple[str, bool] | None:
    """The older settings of the same; None after the newer ones were used, when PyTorch refuses to read the older."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """In this context PyTorch draws from `seed` on every device; afterwards every device draws as before."""
    initialised = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if initialised else []):
        if initialised:
            torch.manual_seed(seed)
        else:  # manual_seed would also seed every GPU as soon as one is used, even after this context
            torch.default_generator.manual_seed(seed)
        yield


def free_memory(device: torch.device) -> int:
    """Bytes that are free now: of the GPU, with what PyTorch's allocator holds in reserve, or of the system."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve

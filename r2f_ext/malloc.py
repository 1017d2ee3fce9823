"""A setting of the C library's allocator that batch after batch of large tensors wants."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
TRIM_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next batch, for the whole process; False where the C library has no mallopt.

    Each batch of pairs frees some hundred megabytes at once. By default glibc gives them back to the system, and the
    next batch pays for every page again, at worst more than for its arithmetic. The commands and the benchmarks set
    this; a program that uses the Python API may.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, TRIM_NEVER))

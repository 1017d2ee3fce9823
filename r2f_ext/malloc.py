"""Tunes the C library's allocator for repeated allocation of large tensors."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
TRIM_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc reuse freed memory instead of returning it to the system, in the whole process.

    Each batch of pairs frees some hundred megabytes at once. By default glibc returns them to the system, and the next
    batch pays a page fault for every page, which can cost more than its arithmetic. The commands and the benchmarks
    call this; a program that uses the Python API may do so too.

    Returns:
        False if the C library has no mallopt or refuses the setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, TRIM_NEVER))

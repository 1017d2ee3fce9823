"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from r2f_ext.malloc import keep_freed_memory
if not keep_freed_memory():
    print("unsupported"); raise SystemExit
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(1 << 20) for _ in range(20)]  # 4 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, *_, last = [faults() for _ in range(6)]  # the heap takes a few rounds to settle
print(first, last)
"""


def test_later_batches_find_their_memory_in_place():
    said = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.strip()
    if said == "unsupported":
        pytest.skip("this C library has no mallopt")
    first, last = map(int, said.split())
    assert first > 10_000 and last < first / 10

"""The precision of stored numbers, by their values."""

import pytest
import torch

from r2f_ext.models.storage import STORED, storage_dtype


@pytest.mark.parametrize("dtype", STORED)
def test_numbers_keep_their_dtype_when_they_are_widened(dtype):
    stored = torch.randn(8, 96, dtype=torch.float64).to(dtype)
    for wider in (dtype, torch.float64):
        assert storage_dtype([stored.to(wider)]) is dtype
        assert storage_dtype([torch.zeros(3, dtype=wider), stored.to(wider)]) is dtype


def test_the_most_precise_of_several_counts_and_no_number_needs_none():
    coarse, fine = torch.randn(4, 4).bfloat16().float(), torch.randn(4, 4)
    assert storage_dtype([coarse, fine]) is torch.float32
    assert storage_dtype([]) is storage_dtype([torch.zeros(2, 2)]) is torch.bfloat16
    assert storage_dtype([torch.tensor([1e-9, 3.0])]) is torch.float32  # 3 fits everywhere, 1e-9 to 7 digits does not

"""Hungarian matching against trying every permutation."""

from itertools import permutations

import torch

from r2f_ext.audit.assign import assign
from r2f_ext.audit.metrics import psnr_db


def test_a_permutation_is_undone():
    originals = torch.rand(6, 1, 8, 8)
    order = torch.tensor([3, 0, 5, 1])
    noisy = originals[order] + 0.05 * torch.randn(4, 1, 8, 8)
    assert torch.equal(assign(noisy, originals), order)


def test_the_total_is_the_best_of_all_permutations():
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        images, originals = torch.rand(2, 4, 1, 2, 2, generator=generator)
        best = max(permutations(range(4)), key=lambda p: psnr_db(images, originals[list(p)]).sum())
        assert assign(images, originals).tolist() == list(best)

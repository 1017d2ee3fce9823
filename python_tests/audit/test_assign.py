"""Hungarian matching against trying every permutation."""

from itertools import permutations

import torch

from r2f_ext.audit.assign import assign, assign_groups
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


def test_groups_are_put_in_order_one_by_one():
    originals = torch.rand(3, 4, 3, 5, 5)
    order = torch.stack([torch.randperm(4) for _ in range(3)])
    shuffled = torch.stack([group[index] for group, index in zip(originals, order, strict=True)])
    noisy = shuffled + 0.01 * torch.randn_like(shuffled)
    assert (assign_groups(noisy, originals) - originals).abs().max() < 0.1
    assert torch.equal(assign_groups(shuffled, originals), originals)

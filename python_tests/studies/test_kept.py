"""Pairs in memory are those of their source, in any part, and may be put one after another."""

import pytest
import torch

from r2f_ext.data import load_images
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.studies.kept import KeptPairs
from r2f_ext.studies.scene import start_of, target_of


@pytest.fixture(scope="module")
def made(embedded):
    target = target_of(embedded, layers=["blocks.0.attn.qkv", "blocks.3.mlp.fc2"])
    images = load_images("embedded", count=7)
    a = start_of(target, 0)
    return KeptPairs.of(target, a, images), GeneratedPairs(target, a, images)


@pytest.mark.parametrize(("start", "stop"), [(0, None), (2, 5), (6, 7), (0, 0)])
def test_parts_are_those_of_the_source(made, start, stop):
    kept, source = made
    found, wanted = (list(each.batches(start, stop)) for each in (kept, source))
    assert len(found) == len(wanted) and len(kept) == 7
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        for name in kept.target.names:
            torch.testing.assert_close(one.updates[name], other.updates[name])
            torch.testing.assert_close(one.gradients.dense(name), other.gradients.dense(name))


def test_a_sum_walks_through_both(made):
    kept, _ = made
    both = kept + kept
    assert len(both) == 14
    (first, second) = both.batches(5, 10)
    assert [len(first.labels), len(second.labels)] == [2, 3]
    name = kept.target.names[1]
    assert torch.equal(both.updates(14)[name][7:], kept.updates(7)[name])

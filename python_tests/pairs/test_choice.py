"""Which source of pairs a recipe gets, and that it holds the pairs asked for."""

import pytest
import torch
from cases import target_of, tiny_base

from r2f_ext.data import ProceduralStream
from r2f_ext.errors import R2FError
from r2f_ext.pairs import GeneratedPairs, SimulatedPairs, Training, pairs_from_images, random_a


@pytest.fixture(scope="module")
def target():
    return target_of(tiny_base(torch.float32), ("blocks.0.attn.qkv",), rank=4)


@pytest.mark.parametrize(
    ("training", "kind", "group_size"),
    [
        (None, GeneratedPairs, 1),
        (Training(batch=3), GeneratedPairs, 3),
        (Training(steps=2), SimulatedPairs, 1),
        (Training(steps=2, samples=2), SimulatedPairs, 2),
        (Training(optimizer="adamw", lr=1e-3), SimulatedPairs, 1),
    ],
)
def test_one_plain_step_is_one_pass_and_other_recipes_are_simulated(target, training, kind, group_size):
    pairs = pairs_from_images(target, a_of(target), "procedural", 4, training)
    assert type(pairs) is kind and len(pairs) == 4 and pairs.group_size == group_size
    (batch,) = pairs.batches()
    assert len(batch.updates["blocks.0.attn.qkv"]) == 4


def test_generated_images_are_streamed_and_the_seed_decides_them(target):
    first, again, other = (
        pairs_from_images(target, a_of(target), "procedural", 4, seed=seed, per_victim_a=True) for seed in (1, 1, 2)
    )
    assert isinstance(first.proxy, ProceduralStream) and first.per_victim_a
    updates = [next(iter(pairs.batches())).updates["blocks.0.attn.qkv"] for pairs in (first, again, other)]
    assert torch.equal(updates[0], updates[1]) and not torch.equal(updates[0], updates[2])


def test_too_few_images_are_refused(target):
    with pytest.raises(R2FError, match="at least 2 are needed"):
        pairs_from_images(target, a_of(target), "procedural", 1)
    with pytest.raises(R2FError):
        pairs_from_images(target, a_of(target), "procedural", 0)


def a_of(target):
    return {name: each[0] for name, each in random_a(target, 0, 0, 1).items()}

"""Pairs in memory are those of their source, in any part, one after another, and for adapters of any layers."""

import pytest
import torch

from r2f_ext.data import load_images
from r2f_ext.decoders import Ridge
from r2f_ext.errors import R2FError
from r2f_ext.pairs import GeneratedPairs, SimulatedPairs, Training, updates_of
from r2f_ext.studies import pairs_in_memory as module
from r2f_ext.studies.pairs_in_memory import PairsInMemory
from r2f_ext.studies.scene import start_of, target_of


@pytest.fixture(scope="module")
def made(embedded):
    target = target_of(embedded, layers=["blocks.0.attn.qkv", "blocks.3.mlp.fc2"])
    images = load_images("embedded", count=7)
    a = start_of(target, 0)
    return PairsInMemory.of(GeneratedPairs(target, a, images)), GeneratedPairs(target, a, images)


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
    assert torch.equal(updates_of(both, 7)[name], updates_of(kept)[name])


def test_other_updates_take_the_place_of_each_pairs_own(made):
    kept, _ = made
    both = kept + kept
    assert [len(part.labels) for part in both.parts] == [7, 7]
    doubled = both.with_updates({name: 2 * update for name, update in updates_of(both).items()})
    for one, other in zip(doubled.batches(3, 9), both.batches(3, 9), strict=True):
        assert all(torch.equal(one.updates[name], 2 * update) for name, update in other.updates.items())
        assert one.images is other.images or torch.equal(one.images, other.images)


@pytest.mark.parametrize("dense", [False, True])
def test_a_decoder_of_pairs_in_memory_is_that_of_their_source(embedded, dense):
    target = target_of(embedded, 2, ["blocks.0.attn.proj", "blocks.3.mlp.fc1"])
    source = SimulatedPairs(target, start_of(target, 0), load_images("embedded", count=24), Training(2), dense=dense)
    kept = PairsInMemory.of(source, 24)
    decoded = []
    for pairs in (source, kept):
        ridge = Ridge(2e-3, 0.5)
        ridge.fit(pairs, 24)
        decoded.append(ridge.decode(updates_of(kept, 0, 2)))
    for name in target.names:
        torch.testing.assert_close(decoded[0].dense[name], decoded[1].dense[name], rtol=1e-3, atol=1e-6)


def test_the_identity_of_written_gradients_counts_once(embedded):
    target = target_of(embedded, 2, ["blocks.3.mlp.fc1"])
    (layer,) = target.layers
    source = SimulatedPairs(target, start_of(target, 0), load_images("embedded", count=8), Training(2), dense=True)
    (part,) = PairsInMemory.of(source).parts
    numbers = 8 * (layer.d_out * (layer.d_in + layer.rank) + part.images[0].numel()) + layer.d_out**2
    assert module._bytes_of(part) == 4 * numbers


def test_some_layers_are_kept_with_the_updates_of_all(made):
    _, source = made
    name = source.target.names[1]
    part = PairsInMemory.of(source, 5, [name])
    assert part.target.names == (name,) and len(part) == 5 and part.one_step and not part.per_victim_a
    (batch,) = part.batches()
    assert set(batch.gradients.x) == {name} and set(batch.updates) == set(source.target.names)
    assert torch.equal(part.labels(1, 4), source.proxy.labels[1:4])


def test_pairs_of_some_layers_at_another_rank_are_those_that_the_model_makes(embedded):
    images = load_images("embedded", count=130)
    whole = PairsInMemory.of_images(target_of(embedded, layers=["blocks.0.mlp.fc2", "blocks.1.mlp.fc1"]), images)
    target = target_of(embedded, 3, ["blocks.0.mlp.fc2"])
    a = start_of(target, 1)
    found, wanted = whole.seen_by(target, a), GeneratedPairs(target, a, images)
    assert len(found) == len(wanted) == 130 and found.group_size == 1
    for one, other in zip(found.batches(90, 115), wanted.batches(90, 115), strict=False):
        rows = slice(0, len(one.labels))
        torch.testing.assert_close(
            one.updates["blocks.0.mlp.fc2"], other.updates["blocks.0.mlp.fc2"][rows], rtol=1e-4, atol=1e-6
        )
        assert set(one.gradients.x) == {"blocks.0.mlp.fc2"}


def test_the_a_of_each_victim_is_kept(embedded):
    target = target_of(embedded, layers=["blocks.0.attn.qkv"])
    own = GeneratedPairs(target, start_of(target, 0), load_images("embedded", count=20), per_victim_a=4)
    (batch,) = PairsInMemory.of(own).batches(3, 8)
    (wanted,) = own.batches(3, 8)
    assert torch.equal(batch.a0["blocks.0.attn.qkv"], wanted.a0["blocks.0.attn.qkv"])


def test_pairs_that_do_not_fit_into_memory_are_refused(made, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with pytest.raises(R2FError, match="smaller base"):
        PairsInMemory.of(made[1])

"""The context: sizes, scale, and independence of which layers a process has."""

import pytest
import torch

from r2f_ext.decoders.context import SIZE, Context


@pytest.fixture
def units(pairs):
    (batch,) = pairs.batches(0, 20)
    return {name: u / u.flatten(1).norm(dim=1)[:, None, None] for name, u in batch.updates.items()}


def test_it_is_a_fixed_linear_map_to_entries_of_about_one(pairs, units):
    context = Context(pairs, seed=3)
    found = context(units)
    assert found.shape == (20, SIZE) and context.size == SIZE
    assert context.widths == {name: u[0].numel() for name, u in units.items()}
    assert 0.8 < float(found.square().mean().sqrt()) < 1.25
    torch.testing.assert_close(context({name: 2 * u for name, u in units.items()}), 2 * found)
    torch.testing.assert_close(Context(pairs, seed=3)(units), found)
    assert not torch.allclose(Context(pairs, seed=4)(units), found)


def test_every_layer_enters(pairs, units):
    context = Context(pairs, seed=0)
    for name in units:
        changed = {**units, name: -units[name]}
        assert not torch.allclose(context(changed), context(units))

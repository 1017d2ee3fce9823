"""Functions that several kinds share: updates of adapters, unit updates, weighted sums of gradients."""

import torch

from r2f_ext.decoders import stack_updates
from r2f_ext.decoders.base import add_up, unit_updates
from r2f_ext.types import LoraUpdate


def test_a_victims_b_points_against_its_update():
    b = {"x": torch.randn(4, 2).double()}
    assert torch.equal(stack_updates([LoraUpdate({}, b), LoraUpdate({}, b)])["x"], -b["x"].float().expand(2, 4, 2))


def test_unit_updates_have_norm_one_and_zero_stays_zero():
    updates = {"x": torch.randn(4, 5, 2), "y": torch.randn(4, 3)}
    updates["x"][2] = 0
    units, norms = unit_updates(updates)
    for name, unit in units.items():
        torch.testing.assert_close(unit * norms[name].view(-1, *[1] * (unit.ndim - 1)), updates[name])
    assert not units["x"][2].any()
    torch.testing.assert_close(units["y"].norm(dim=1), torch.ones(4))


def test_gradients_of_batches_are_added_up_by_their_weights(pairs):
    count = 113  # ends within a batch
    weights = {name: torch.randn(3, count) for name in pairs.target.names}
    found = add_up(pairs, count, lambda batch, rows: {name: w[:, rows] for name, w in weights.items()})
    for name, w in weights.items():
        true = torch.cat([batch.gradients.dense(name) for batch in pairs.batches(0, count)])
        expected = torch.einsum("vp,pij->vij", w.double(), true.double())
        assert (found.dense[name].double() - expected).norm() < 1e-5 * expected.norm()

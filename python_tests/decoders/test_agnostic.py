"""One decoder for every A."""

import pytest
import torch
from cases import cosine

from r2f_ext.decoders import AgnosticPairs, Ridge
from r2f_ext.errors import R2FError
from r2f_ext.pairs import SimulatedPairs, Training, random_a
from r2f_ext.pairs.generate import project

FIT, ALL = 120, 160


def test_the_view_is_the_core_of_the_projected_gradient(pairs):
    view = AgnosticPairs(pairs, seed=3)
    (batch,) = pairs.batches(5, 9)
    a = random_a(pairs.target, 3, 5, 4)
    seen = view.view(project(pairs.target, batch.gradients, a), a)
    for name, found in seen.items():
        rows, _ = torch.linalg.qr(a[name].mT.double())
        projected = batch.gradients.dense(name).double() @ rows @ rows.mT
        expected = view.core.left[name].double().mT @ projected @ view.core.right[name].double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    (again,) = view.batches(5, 9)
    assert all(torch.equal(again.updates[name], found) for name, found in seen.items())


def test_a_decoder_fitted_over_many_a_beats_the_projection_on_an_unseen_one(pairs):
    view, decoder = AgnosticPairs(pairs), Ridge()
    decoder.fit(view, FIT)
    (batch,) = pairs.batches(FIT, ALL)  # of the adapter's own A, which the view never used
    decoded = decoder.decode(view.view(batch.updates, pairs.a)).dense
    for name, gradient in decoded.items():
        true, a = batch.gradients.dense(name), pairs.a[name]
        floor = cosine(true @ torch.linalg.pinv(a) @ a, true).mean()
        assert cosine(gradient, true).mean() > floor + 0.1


def test_pairs_of_many_steps_are_refused(pairs):
    trained = SimulatedPairs(pairs.target, pairs.a, pairs.proxy, Training(steps=2))
    with pytest.raises(R2FError, match="their gradients depend on A"):
        AgnosticPairs(trained)

"""Held-out cosines against numpy."""

import numpy as np
import torch

from r2f_ext.decoders import HeldOut, held_out_cosines
from r2f_ext.pairs import generate
from r2f_ext.types import Gradient


def test_cosines_are_those_of_the_named_pairs(pairs, monkeypatch):
    monkeypatch.setattr(generate, "BATCH_GROUPS", 4)
    layers = pairs.target.layers
    guess = Gradient({layer.name: torch.randn(10, layer.d_out, layer.d_in) for layer in layers})
    for layer in layers:  # guess 3 is the exact gradient of pair 53, at another scale
        guess.dense[layer.name][3] = 7 * next(pairs.batches(53, 54)).gradients.dense(layer.name)[0]
    found = held_out_cosines(guess, pairs, 50, 60)
    true = [batch.gradients for batch in pairs.batches(50, 60)]
    for layer in layers:
        rows = torch.cat([g.dense(layer.name) for g in true]).flatten(1).double().numpy()
        mine = guess.dense[layer.name].flatten(1).double().numpy()
        expected = (rows * mine).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(mine, axis=1)
        np.testing.assert_allclose(found.cosine[layer.name].numpy(), expected, atol=1e-4)
        assert abs(found.cosine[layer.name][3] - 1) < 1e-4
        ratio = np.linalg.norm(mine, axis=1) / np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose(found.norm[layer.name].numpy(), ratio, rtol=1e-4)
        assert abs(found.norm[layer.name][3] - 7) < 1e-3


def test_summary():
    values, norms = torch.rand(37), 2 * torch.rand(37)
    summary = HeldOut({"x": values}, {"x": norms}).summary()["x"]
    assert abs(summary.cosine_mean - values.double().mean()) < 1e-6
    assert abs(summary.cosine_p05 - np.percentile(values.numpy(), 5)) < 1e-6
    assert abs(summary.norm_error - np.abs(norms.double().numpy() - 1).mean()) < 1e-6

"""Principal directions on both sides, against numpy's SVD."""

import numpy as np
import torch

from r2f_ext.decoders.core import Core


def test_directions_are_those_of_the_stacked_gradients(pairs):
    core = Core.of(pairs, 20, 6)
    (batch,) = pairs.batches(0, 20)
    name = pairs.target.names[1]
    unit = batch.gradients.dense(name) / batch.updates[name].flatten(1).norm(dim=1)[:, None, None]
    rows = unit.transpose(0, 1).flatten(1).double().numpy()  # [d_out, 20 d_in]
    columns = unit.flatten(0, 1).double().numpy()
    left = np.linalg.svd(rows, full_matrices=False)[0][:, :6]
    right = np.linalg.svd(columns, full_matrices=False)[2][:6].T
    for found, expected in ((core.left[name], left), (core.right[name], right)):
        np.testing.assert_allclose(np.abs(found.double().numpy().T @ expected), np.eye(6), atol=1e-2)


def test_cores_come_from_the_factors_and_expand_to_the_projection(pairs):
    core = Core.of(pairs, 20, 6)
    (batch,) = pairs.batches(30, 33)
    cores = core(batch.gradients)
    for name, gradients in core.expand(cores).items():
        true, left, right = batch.gradients.dense(name), core.left[name], core.right[name]
        torch.testing.assert_close(cores[name], left.mT @ true @ right, rtol=1e-3, atol=1e-5 * float(true.norm()))
        torch.testing.assert_close(
            gradients, left @ left.mT @ true @ right @ right.mT, rtol=1e-3, atol=1e-5 * float(true.norm())
        )

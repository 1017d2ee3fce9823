"""Nystrom against the exact kernel system, and on held-out pairs."""

import torch
from cases import gains_over_projection

from r2f_ext.decoders import KernelRidge, kernel_ridge
from r2f_ext.decoders.kernel import GAMMA, OWN

FIT, ALL = 120, 160


def test_with_every_pair_a_landmark_it_is_exact_kernel_ridge(pairs, monkeypatch):
    """The kernel's two parts, own and full, add up: k' = own / 2 <z, z'> + k, and w = (K' + lam I)^-1 k'."""
    monkeypatch.setattr(kernel_ridge, "RIDGES", (1e-2,))
    decoder, count = KernelRidge(landmarks=100), 40
    decoder.start(pairs, count)
    decoder.missing = count
    (batch,) = pairs.batches(0, count)
    decoder.observe(batch)
    decoder.finish()
    (asked,) = pairs.batches(FIT, FIT + 5)
    decoded = decoder.decode(asked.updates).dense

    def units(updates):
        return {n: torch.nn.functional.normalize(u.flatten(1).double(), dim=1) for n, u in updates.items()}

    fitted, other = units(batch.updates), units(asked.updates)
    for name in pairs.target.names:  # one layer a block: the block's mean is the layer's own
        kernels = []
        for rows in (fitted, other):
            own = rows[name] @ fitted[name].mT
            every = torch.stack([rows[n] @ fitted[n].mT for n in fitted]).mean(0)
            c = OWN * own + (1 - OWN) / 2 * (own + every)
            kernels.append(OWN / 2 * own + (c + torch.exp(2 * GAMMA * (c - 1))) / 2)
        weights = torch.linalg.solve(kernels[0] + 1e-2 * torch.eye(count), kernels[1].mT).mT
        norms = batch.updates[name].flatten(1).norm(dim=1).double()
        scale = asked.updates[name].flatten(1).norm(dim=1).double()[:, None]
        expected = weights / norms * scale @ batch.gradients.dense(name).flatten(1).double()
        assert (decoded[name].flatten(1) - expected).norm() < 2e-3 * expected.norm()


def test_it_beats_the_projection_on_held_out_pairs(pairs, monkeypatch):
    monkeypatch.setattr(kernel_ridge, "RIDGES", (1e-3, 1e-2))
    decoder = KernelRidge(landmarks=50)
    assert min(gains_over_projection(decoder, pairs, FIT, ALL).values()) > 0.2
    assert {len(z) for z in decoder.landmarks.values()} == {50}

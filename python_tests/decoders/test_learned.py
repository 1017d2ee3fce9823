"""Losses against their dense definition, and properties of all kinds that are trained by gradient descent."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from cases import LINEAR, gains_over_projection, proxy_set, target_of, tiny_base
from emulated_graphs import emulated_graphs

from r2f_ext.decoders import MLP, Conv, UNet, learned
from r2f_ext.decoders.learned import LOSSES, NORM_WEIGHT, PATIENCE, pair_losses
from r2f_ext.errors import R2FError
from r2f_ext.pairs import GeneratedPairs

FIT, ALL = 120, 160


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_from_cores_are_those_of_whole_gradients(loss):
    left, _ = torch.linalg.qr(torch.randn(9, 4).double())
    right, _ = torch.linalg.qr(torch.randn(7, 3).double())
    true, core = torch.randn(5, 9, 7).double(), torch.randn(5, 4, 3).double()
    whole = left @ core @ right.mT
    found = pair_losses(core.flatten(1), (left.mT @ true @ right).flatten(1), true.flatten(1).norm(dim=1), loss)
    angle = 1 - F.cosine_similarity(whole.flatten(1), true.flatten(1))
    ratio = (whole.flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)).log()
    error = (whole - true).flatten(1).square().sum(1) / true.flatten(1).square().sum(1)
    expected = {"cosine": angle, "mse": error, "cosine_norm": angle + NORM_WEIGHT * ratio.square()}[loss]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [MLP, Conv, UNet])
def test_they_beat_the_projection_on_held_out_pairs(kind, pairs):
    decoder = kind(epochs=40 if kind is MLP else 5)
    assert min(gains_over_projection(decoder, pairs, FIT, ALL).values()) > 0.1


def test_the_same_seed_learns_the_same(pairs):
    (batch,) = pairs.batches(FIT, FIT + 3)
    found = []
    for seed in (1, 1, 2):
        decoder = Conv(epochs=1, seed=seed)
        decoder.fit(pairs, 40)
        found.append(decoder.decode(batch.updates).dense[pairs.target.names[0]])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [MLP, Conv, UNet])
def test_steps_that_are_captured_learn_what_calls_learn(kind, precision, device, monkeypatch):
    """With a last batch of another size, and layers that stop before the others; on a CPU in emulation."""
    monkeypatch.setattr(learned, "PATIENCE", 1)
    base = tiny_base(torch.float32)
    base.model.to(device)
    target = target_of(base, LINEAR)
    a = {layer.name: torch.randn(layer.rank, layer.d_in).to(device) for layer in target.layers}
    pairs, decoded = GeneratedPairs(target, a, proxy_set(150, base)), []
    for _ in range(2):
        decoder = kind(epochs=6)
        decoder.precision = precision
        with emulated_graphs() if device.type == "cpu" else nullcontext([True]) as captures:
            decoder.fit(pairs, 150)
        assert decoded or (captures and all(captures))  # the second time nothing is captured
        decoded.append(decoder.decode(next(iter(pairs.batches(0, 20))).updates).dense)
        monkeypatch.setattr(learned, "Replayed", lambda function: function)
    for name, expected in decoded[1].items():
        assert (decoded[0][name] - expected).norm() < 2e-2 * expected.norm()


def test_training_stops_when_held_out_pairs_no_longer_gain(pairs, monkeypatch):
    """With a step size of 0 no epoch after the first improves, so training stops after PATIENCE more epochs."""
    monkeypatch.setattr(Conv, "learning_rate", 0.0)
    steps, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: steps.append(1) or step(self, *a))
    decoder = Conv(epochs=10)
    decoder.fit(pairs, 40)
    assert len(steps) == 1 + PATIENCE
    assert not decoder.inputs and not decoder.cores


@pytest.mark.parametrize("kind", [MLP, Conv, UNet])
def test_in_bfloat16_they_learn_nearly_the_same(kind, pairs):
    gains = {}
    for precision in (torch.float32, torch.bfloat16):
        decoder = kind(epochs=4 if kind is MLP else 1)
        decoder.precision = precision
        gains[precision] = gains_over_projection(decoder, pairs, 60, 80)
        assert all(p.dtype == torch.float32 for network in decoder.networks.values() for p in network.parameters())
    for name, gain in gains[torch.float32].items():
        assert gains[torch.bfloat16][name] != gain
        assert gains[torch.bfloat16][name] == pytest.approx(gain, abs=0.01)


def test_a_network_of_another_version_is_refused(pairs):
    decoder = Conv(epochs=1)
    decoder.fit(pairs, 40)
    state = {name: tensor for name, tensor in decoder.state().items() if "context" not in name}
    with pytest.raises(R2FError, match=r"conv decoder of .* does not fit this version's network: run r2f fit again"):
        Conv().load_state(state, pairs)


@pytest.mark.parametrize("kind", [MLP, Conv, UNet])
def test_bad_settings(kind):
    with pytest.raises(R2FError, match="unknown loss 'l1': choose cosine, mse"):
        kind(loss="l1")
    with pytest.raises(R2FError, match="epochs is 0"):
        kind(epochs=0)

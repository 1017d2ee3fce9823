"""The U-Net on the kernel ridge estimate, against a world whose answer is known."""

import pytest
import torch

from r2f_ext.errors import R2FError
from r2f_ext.inversion import amortised
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.inversion.unet import RefiningUNet, UNetConfig, UNetInverter, Whitening


@pytest.fixture(scope="module")
def world():
    """Smooth images, and one layer's updates that are linear in them: direction tells all but the brightness."""
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(400, 1, 2, 2, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (8, 8), mode="bilinear").sub(0.5).mul(3).sigmoid()
    labels = torch.randint(0, 2, (400,), generator=generator)
    maps = torch.randn(2, 65, 60, generator=generator)
    facts = torch.cat([images.flatten(1) - 0.5, torch.ones(400, 1)], dim=1)
    updates = {"a": torch.einsum("nk,nkd->nd", facts, maps[labels])}
    return updates, images, labels


def part(updates, rows):
    return {name: update[rows] for name, update in updates.items()}


@pytest.fixture(scope="module")
def ridge(world):
    updates, images, labels = world
    return AmortisedInverter(part(updates, slice(0, 340)), images[:340], labels[:340], 2)


def test_leave_one_out_is_the_fit_without_that_pair(world, ridge):
    updates, images, _ = world
    estimate = ridge.leave_one_out()[7]
    label = int(ridge.labels[7])
    rows = torch.nonzero(ridge.labels == label).flatten()
    others = rows[rows != 7]
    assert len(rows) >= 100
    unit = torch.nn.functional.normalize(updates["a"].double(), dim=1)

    def kernel(i, j):
        return torch.exp(-2 * ridge._fit(label).choice.gamma * (1 - unit[i] @ unit[j].T))

    damped = kernel(others, others) + ridge._fit(label).choice.ridge * torch.eye(len(others))
    pixels, mean = images.flatten(1).double(), images[rows].flatten(1).double().mean(0)
    expected = kernel(torch.tensor([7]), others) @ torch.linalg.solve(damped, pixels[others] - mean) + mean
    torch.testing.assert_close(estimate.double(), expected[0], rtol=1e-3, atol=1e-3)


def test_whitened_features_have_variance_one_where_there_is_any():
    torch.manual_seed(0)
    rows = torch.randn(500, 6) * torch.tensor([5.0, 3, 2, 1, 0.5, 0])
    features = Whitening({"a": rows}, 6)({"a": rows})
    torch.testing.assert_close(features.T @ features / 500, torch.diag(features.var(0)), rtol=0, atol=0.05)
    assert ((features.std(0)[:5] - 1).abs() < 0.12).all() and features[:, 5].abs().max() < 0.1


def test_an_untrained_net_changes_nothing():
    estimate = torch.rand(2, 3, 12, 16)
    assert torch.equal(RefiningUNet(3, 5, 4)(estimate, torch.randn(2, 5)), estimate)


def test_the_net_mends_a_ridge_that_is_damped_too_much(world, monkeypatch):
    monkeypatch.setattr(amortised, "RIDGES", (10.0,))
    updates, images, labels = world
    ridge = AmortisedInverter(part(updates, slice(0, 340)), images[:340], labels[:340], 2)
    inverter = UNetInverter(ridge, UNetConfig(epochs=20, batch=34, width=8, components=16, noise=0.02))
    before = ridge.invert(part(updates, slice(340, 400)))
    after = inverter.invert(part(updates, slice(340, 400)))
    assert inverter.held_out_psnr_db > inverter.ridge_psnr_db + 1
    assert (after.images - images[340:]).square().mean() < 0.8 * (before.images - images[340:]).square().mean()
    assert torch.equal(after.labels, before.labels)


def test_equal_seeds_give_equal_nets(world, ridge):
    updates = part(world[0], slice(340, 350))
    config = UNetConfig(epochs=1, width=4, components=8)
    one, two = (UNetInverter(ridge, config).invert(updates).images for _ in range(2))
    assert torch.equal(one, two)


def test_odd_sides_are_refused(world):
    updates, _, labels = world
    with pytest.raises(R2FError, match=r"multiples of 4, got 6x6"):
        UNetInverter(AmortisedInverter(updates, torch.rand(400, 1, 6, 6), labels, 2))


def test_its_seed_decides_and_the_global_state_is_left_alone(world, ridge):
    updates, _, _ = world
    found = []
    for outside in (1, 2):
        torch.manual_seed(outside)
        state = torch.get_rng_state()
        found.append(UNetInverter(ridge, UNetConfig(epochs=1, width=4)).invert(part(updates, slice(340, 345))).images)
        assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(*found)

"""Kernel ridge from updates to images, against a world whose answer is known."""

import pytest
import torch

from r2f_ext.errors import R2FError
from r2f_ext.inversion import amortised
from r2f_ext.inversion.amortised import AmortisedInverter


@pytest.fixture
def world():
    """Updates of two layers that are linear in the pixels and the label."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 4, (300,), generator=generator)
    images = torch.rand(300, 1, 3, 3, generator=generator)
    facts = torch.cat([images.flatten(1) - 0.5, 2 * torch.nn.functional.one_hot(labels, 4).float()], dim=1)
    layers = {"a": (6, 4), "b": (10, 2)}
    updates = {
        name: (facts @ torch.randn(13, rows * rank, generator=generator)).unflatten(1, (rows, rank))
        for name, (rows, rank) in layers.items()
    }
    return updates, images, labels


def part(updates, rows):
    return {name: update[rows] for name, update in updates.items()}


def test_training_pairs_come_back_when_lambda_is_tiny(world, monkeypatch):
    monkeypatch.setattr(amortised, "RIDGES", (1e-6,))
    updates, images, labels = world
    updates = {name: u[:60].double() for name, u in updates.items()}
    found = AmortisedInverter(updates, images[:60].double(), labels[:60], 4).invert(updates)
    torch.testing.assert_close(found.images.float(), images[:60], rtol=0, atol=2e-3)
    assert torch.equal(found.labels, labels[:60])


def test_held_out_images_and_labels(world):
    updates, images, labels = world
    inverter = AmortisedInverter(part(updates, slice(0, 250)), images[:250], labels[:250], 4)
    found = inverter.invert(part(updates, slice(250, 300)))
    error = (found.images - images[250:]).square().mean()
    assert error < 0.25 * (images[:250].mean(0) - images[250:]).square().mean()
    assert (found.labels == labels[250:]).float().mean() > 0.9
    assert found.images.shape == (50, 1, 3, 3) and found.images.min() >= 0 and found.images.max() <= 1
    assert abs(found.details["held_out_psnr_db"] + 10 * torch.log10(error)) < 4


def test_the_scale_of_an_update_plays_no_part(world):
    updates, images, labels = world
    inverter = AmortisedInverter(part(updates, slice(0, 250)), images[:250], labels[:250], 4)
    asked = part(updates, slice(250, 260))
    small = {name: 1e-7 * update for name, update in asked.items()}
    torch.testing.assert_close(inverter.invert(small).images, inverter.invert(asked).images, rtol=1e-3, atol=1e-4)


def test_it_is_kernel_ridge_written_out(world):
    updates, images, labels = world
    train = part(updates, slice(0, 100))
    inverter = AmortisedInverter(train, images[:100], labels[:100], 4)
    asked = part(updates, slice(200, 205))

    def kernel(x, y):
        cosines = [
            torch.nn.functional.cosine_similarity(x[n].flatten(1)[:, None], y[n].flatten(1)[None], dim=2) for n in x
        ]
        return torch.exp(-2 * inverter.choice.gamma * (1 - torch.stack(cosines).mean(0))).double()

    pixels = images[:100].flatten(1).double()
    damped = kernel(train, train) + inverter.choice.ridge * torch.eye(100)
    expected = kernel(asked, train) @ torch.linalg.solve(damped, pixels - pixels.mean(0)) + pixels.mean(0)
    found = inverter.invert(asked).images.flatten(1).double()
    torch.testing.assert_close(found, expected.clamp(0, 1), rtol=1e-3, atol=1e-3)


def test_a_stranger_is_flagged(world):
    updates, images, labels = world
    inverter = AmortisedInverter(part(updates, slice(0, 250)), images[:250], labels[:250], 4)
    assert inverter.far_from_proxy({n: torch.randn(8, *u.shape[1:]) for n, u in updates.items()}).all()
    assert inverter.far_from_proxy(part(updates, slice(250, 300))).float().mean() < 0.3
    mixed = {n: torch.cat([u[250:251], torch.randn(1, *u.shape[1:])]) for n, u in updates.items()}
    assert inverter.far_from_proxy(mixed).tolist() == [False, True]


def test_nineteen_pairs_are_too_few(world):
    updates, images, labels = world
    with pytest.raises(R2FError, match="at least 20 proxy pairs, got 19"):
        AmortisedInverter(part(updates, slice(0, 19)), images[:19], labels[:19], 4)

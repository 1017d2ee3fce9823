"""Pretraining: the loop against a plain one, its schedule, and that it learns."""

import math

import pytest
import torch
import torch.nn.functional as F

from r2f_ext.models.embedded import PIXEL_MEAN, PIXEL_STD, build_embedded_vit
from r2f_ext.models.pretrain import Pretraining, classification_accuracy, pretrain


@pytest.fixture(scope="module")
def dark_and_light():
    """Gray images whose labels say whether they are dark or light."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 2
    noise = torch.randint(0, 100, (24, 1, 32, 32), generator=generator, dtype=torch.uint8)
    return noise + 150 * labels[:, None, None, None].to(torch.uint8), labels


def test_it_is_adamw_with_warm_up_and_cosine_over_epochs(dark_and_light):
    """Two epochs of three steps each, bit for bit."""
    images, labels = dark_and_light
    torch.manual_seed(3)
    model = build_embedded_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    for step in range(6):
        order = torch.randperm(24) if step % 3 == 0 else order  # noqa: F821
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, step / 1) * 0.5 * (1 + math.cos(math.pi * step / 6))
        batch = order[step % 3 * 8 : step % 3 * 8 + 8]
        pixels = (images[batch].float() / 255 - PIXEL_MEAN[0]) / PIXEL_STD[0]
        optimizer.zero_grad()
        F.cross_entropy(model(pixels.expand(-1, 3, -1, -1)), labels[batch]).backward()
        optimizer.step()
    found = pretrain(images, labels, Pretraining(steps=6, batch=8, lr=2e-3, seed=3))
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_the_shipped_recipe_warms_up_for_200_steps():
    recipe = Pretraining(steps=2811)
    assert recipe.factor(0) == 0 and recipe.factor(100) == pytest.approx(
        0.5 * 0.5 * (1 + math.cos(math.pi * 100 / 2811))
    )
    assert recipe.factor(200) > recipe.factor(199) * 0.999 and recipe.factor(2811) == pytest.approx(0)


def test_it_learns_leaves_the_random_state_and_tells_the_loss(dark_and_light):
    images, labels = dark_and_light
    told = []
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    model = pretrain(images, labels, Pretraining(steps=12, batch=8), lambda steps, line="": told.append((steps, line)))
    assert torch.equal(torch.rand(1), expected)
    assert classification_accuracy(model, images, labels) == 1.0 and not model.training
    assert sum(steps for steps, _ in told) == 12 and next(line for _, line in told if line).startswith("step 12 of 12")

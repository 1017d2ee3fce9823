"""Matching goes down, keeps the best image, and repeats itself."""

import pytest
import torch
from cases import LINEAR, samples, target_of, tiny_base

from r2f_ext.capture import Capture
from r2f_ext.errors import R2FError
from r2f_ext.inversion.matching import MatchingConfig, match
from r2f_ext.inversion.objectives import GradientCosine, total_variation
from r2f_ext.types import Gradient

CONFIG = MatchingConfig(steps=12, step_size=0.03, tv_weight=0.02)


@pytest.fixture
def world():
    base = tiny_base(torch.float32)
    target = target_of(base, LINEAR)
    images, labels = samples(3, base, torch.float32)
    with Capture(target) as capture:
        factors = capture(images[:, None], labels[:, None])
    observed = Gradient({name: factors.dense(name) for name in LINEAR})
    return target, observed, images, labels


def run(world, config=CONFIG, on_step=lambda: None):
    target, observed, images, labels = world
    start = torch.full_like(images, 0.5)
    return match(target, GradientCosine(observed), start, labels, config, "matching", "a test", on_step)


def losses(world, images):
    target, observed, _, labels = world
    with Capture(target) as capture:
        factors = capture(images[:, None], labels[:, None])
    return GradientCosine(observed)(factors) + CONFIG.tv_weight * total_variation(images)


def test_it_goes_down_and_says_so(world):
    steps = []
    found = run(world, on_step=lambda: steps.append(1))
    before, after = losses(world, torch.full_like(found.images, 0.5)), losses(world, found.images)
    assert (after < before - 0.05).all()
    assert found.details["loss_start"] == pytest.approx(float(before.mean()), rel=1e-4)
    assert found.details["loss_end"] == pytest.approx(float(after.mean()), rel=1e-3)
    assert len(steps) == found.details["steps"] == 12
    assert found.images.min() >= 0 and found.images.max() <= 1 and found.images.shape == (3, 3, 16, 16)
    assert (found.route, found.why) == ("matching", "a test") and torch.equal(found.labels, world[3])
    assert not found.images.requires_grad


def test_the_best_image_is_kept_not_the_last(world):
    """Wild steps leave a perfect start at once; the start must come back."""
    target, observed, images, labels = world
    wild = MatchingConfig(steps=6, step_size=0.5, tv_weight=0.0)
    found = match(target, GradientCosine(observed), images, labels, wild, "matching", "")
    assert torch.equal(found.images, images)


def test_it_repeats_itself(world):
    first, again = run(world), run(world)
    assert torch.equal(first.images, again.images)


def test_victims_do_not_disturb_one_another(world):
    target, observed, images, labels = world
    together = run(world).images
    alone = run((target, Gradient({n: g[1:2] for n, g in observed.dense.items()}), images[1:2], labels[1:2])).images
    # A sign may flip where a derivative is next to zero: nearly all pixels agree.
    assert ((alone[0] - together[1]).abs() < 1e-4).float().mean() > 0.97


def test_no_steps_is_the_start(world):
    assert torch.equal(run(world, MatchingConfig(steps=0)).images, torch.full((3, 3, 16, 16), 0.5))


def test_an_observed_nan_is_one_error(world):
    world[1].dense[LINEAR[0]][1, 0, 0] = float("nan")
    with pytest.raises(R2FError, match="not finite"):
        run(world)

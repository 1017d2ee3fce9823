"""Training of a diffusion prior: it learns, is repeatable, and gives what `ScoreDistillation` reads."""

import pytest
import torch

from r2f_ext.data import ImageSet
from r2f_ext.errors import R2FError
from r2f_ext.inversion.prior import ScoreDistillation
from r2f_ext.inversion.prior_training import build_unet, train_prior

pytest.importorskip("diffusers")
SMALL = {"batch": 4, "channels": (8, 8, 16)}


def images(side=16):
    gray = torch.zeros(20, 3, side, side, dtype=torch.uint8)
    gray[:, :, side // 2 :] = 255  # every image is the same: half black, half white
    return ImageSet("halves", gray, torch.zeros(20, dtype=torch.int64))


def test_it_learns_its_images_and_leaves_the_global_generator_alone():
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    said = []
    unet, scheduler, losses = train_prior(images(8), 100, seed=1, advance=lambda n, line="": said.append(line), **SMALL)
    assert torch.equal(torch.rand(1), expected)
    assert len(losses) == 100 and sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert said[-1] == f"step 100: loss {sum(losses) / 100:.4f}" and set(said[:-1]) == {""}
    prior, truth = ScoreDistillation(unet, scheduler, 1.0), images(8).batch([0])
    away = (0.5 - truth) + 0 * truth
    assert torch.nn.functional.cosine_similarity(prior.gradient(truth + away, 3).flatten(), away.flatten(), dim=0) > 0


def test_the_seed_decides_the_result():
    one, two, other = (train_prior(images(), 2, seed=seed, **SMALL)[2] for seed in (0, 0, 1))
    assert one == two and one != other


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_every_prediction_can_be_trained(kind):
    unet, scheduler, losses = train_prior(images(), 2, kind, **SMALL)
    assert scheduler.config["prediction_type"] == kind and len(losses) == 2
    assert ScoreDistillation(unet, scheduler).gradient(torch.rand(2, 3, 16, 16), 0).isfinite().all()


def test_sizes_that_cannot_be_halved_twice_are_refused():
    with pytest.raises(
        R2FError, match="a prior for images of 18x16 cannot be built: both sides must be multiples of 4"
    ):
        build_unet(18, 16)
    assert build_unet(16, 20).config["sample_size"] == (16, 20)

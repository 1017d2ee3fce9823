"""Score distillation, against diffusers' own schedulers and models whose answer is known."""

import json
import shutil

import pytest
import torch
from cases import LINEAR, samples, target_of, tiny_base
from torch import nn

from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.errors import R2FError
from r2f_ext.inversion.matching import MatchingConfig, match
from r2f_ext.inversion.objectives import UpdateObjective
from r2f_ext.inversion.prior import ScoreDistillation, as_noise

diffusers = pytest.importorskip("diffusers")
KINDS = ("epsilon", "sample", "v_prediction")


def scheduler(kind="epsilon"):
    return diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", prediction_type=kind)


def small_unet(channels=1, size=16):
    torch.manual_seed(2)
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


class Oracle(nn.Module):
    """Knows the one image there is: predicts exactly what a model trained on it alone would."""

    def __init__(self, truth, kind, schedule):
        super().__init__()
        self.truth, self.kind, self.alpha_bar = 2 * truth - 1, kind, schedule.alphas_cumprod
        self.config = {"in_channels": truth.shape[1], "out_channels": truth.shape[1], "sample_size": truth.shape[-1]}

    def forward(self, noisy, times):
        a = self.alpha_bar[times].view(-1, 1, 1, 1).sqrt()
        s = (1 - a.square()).sqrt()
        noise = (noisy - a * self.truth) / s
        sample = {"epsilon": noise, "sample": self.truth.expand_as(noisy), "v_prediction": a * noise - s * self.truth}
        return type("Output", (), {"sample": sample[self.kind]})


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_found_as_the_scheduler_defines_it(kind):
    schedule = scheduler(kind)
    clean, noise, times = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([1, 20, 60, 90])
    noisy = schedule.add_noise(clean, noise, times)
    target = {"epsilon": noise, "sample": clean, "v_prediction": schedule.get_velocity(clean, noise, times)}[kind]
    variance = (1 - schedule.alphas_cumprod[times]).view(-1, 1, 1, 1)
    torch.testing.assert_close(as_noise(target, noisy, variance, kind), noise, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_knows_the_image_pulls_towards_it(kind):
    schedule, truth = scheduler(kind), torch.rand(1, 1, 8, 8)
    prior = ScoreDistillation(Oracle(truth, kind, schedule), schedule, weight=1.0)
    images = torch.rand(3, 1, 8, 8)
    # eps_hat - eps = a (x - truth) / s exactly, so the pull is along 2 (image - truth), by a positive factor an image.
    pull, away = prior.gradient(images, 5), images - truth
    factor = (pull * away).flatten(1).sum(1) / away.square().flatten(1).sum(1)
    assert (factor > 0).all()
    torch.testing.assert_close(pull, factor.view(-1, 1, 1, 1) * away, rtol=1e-2, atol=1e-4)
    assert prior.gradient(truth.expand(3, -1, -1, -1), 5).abs().max() < 1e-4


def test_gray_models_share_their_gradient_over_colours():
    schedule, truth = scheduler(), torch.rand(1, 1, 8, 8)
    prior = ScoreDistillation(Oracle(truth, "epsilon", schedule), schedule, weight=1.0)
    gray = torch.rand(2, 1, 8, 8)
    colour = prior.gradient(gray.expand(-1, 3, -1, -1), 1)
    assert colour.shape == (2, 3, 8, 8)
    torch.testing.assert_close(3 * colour[:, :1], prior.gradient(gray, 1), rtol=1e-3, atol=1e-5)


def test_seed_and_step_decide(tmp_path):
    images = torch.rand(2, 1, 16, 16)
    one, other = (ScoreDistillation(small_unet(), scheduler(), seed=seed) for seed in (0, 1))
    assert torch.equal(one.gradient(images, 3), one.gradient(images, 3))
    assert not torch.equal(one.gradient(images, 3), one.gradient(images, 4))
    assert not torch.equal(one.gradient(images, 3), other.gradient(images, 3))


@pytest.mark.parametrize("parts", [True, False])
def test_a_saved_pipeline_comes_back(tmp_path, parts):
    unet, schedule = small_unet(), scheduler("v_prediction")
    unet.save_pretrained(tmp_path / "unet" if parts else tmp_path)
    schedule.save_pretrained(tmp_path / "scheduler" if parts else tmp_path)
    images = torch.rand(2, 3, 16, 16)
    read = ScoreDistillation.from_folder(tmp_path, weight=0.5)
    assert read.kind == "v_prediction"
    torch.testing.assert_close(read.gradient(images, 0), ScoreDistillation(unet, schedule, 0.5).gradient(images, 0))


def test_pickles_and_strange_classes_are_refused(tmp_path):
    small_unet().save_pretrained(tmp_path / "pickle", safe_serialization=False)
    scheduler().save_pretrained(tmp_path / "pickle")
    with pytest.raises(R2FError, match=r"has no diffusion_pytorch_model\.safetensors"):
        ScoreDistillation.from_folder(tmp_path / "pickle")
    small_unet().save_pretrained(tmp_path / "other")
    scheduler().save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "_class_name": "Evil"}))
    with pytest.raises(R2FError, match="holds a Evil"):
        ScoreDistillation.from_folder(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("[")
    with pytest.raises(R2FError, match="not the config"):
        ScoreDistillation.from_folder(tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(R2FError, match=r"has no config\.json"):
        ScoreDistillation.from_folder(tmp_path / "other")


def test_images_and_schedules_that_do_not_fit():
    prior = ScoreDistillation(small_unet(), scheduler())
    with pytest.raises(R2FError, match=r"images of \(16, 16\), not of \(32, 32\)"):
        prior.gradient(torch.rand(1, 3, 32, 32), 0)
    with pytest.raises(R2FError, match="reads 3 channels, the images have 1"):
        ScoreDistillation(small_unet(3), scheduler()).gradient(torch.rand(1, 1, 16, 16), 0)
    strange = scheduler()
    strange.register_to_config(prediction_type="flow")
    with pytest.raises(R2FError, match="predicts 'flow'"):
        ScoreDistillation(small_unet(), strange)


def test_matching_follows_a_prior_that_knows_the_image(tmp_path):
    base = tiny_base(torch.float32)
    target = target_of(base, LINEAR)
    images, labels = samples(2, base, torch.float32)
    a = {layer.name: torch.randn(layer.rank, layer.d_in) for layer in target.layers}
    with Capture(target) as capture:
        observed = project(target, capture(images[:, None], labels[:, None]), a)
    schedule, config = scheduler(), MatchingConfig(steps=20, step_size=0.02, tv_weight=0.0)
    start = torch.full_like(images, 0.5)

    def error(prior, state=None):
        objective = UpdateObjective(target, a, observed)
        found = match(target, objective, start, labels, config, "matching", "test", state=state, prior=prior)
        return (found.images - images).square().mean()

    def oracle(weight):
        return ScoreDistillation(Oracle(images, "epsilon", schedule), schedule, weight=weight).gradient

    state = tmp_path / "search.safetensors"
    assert error(oracle(10.0), state) < 0.5 * error(None)
    error(oracle(10.0), state)  # the same prior goes on
    for other in (None, oracle(9.0)):
        with pytest.raises(R2FError, match="the state of another search"):
            error(other, state)

"""Matching lowers the loss, returns the best image of every trial, is reproducible and can be resumed."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import LINEAR, samples, target_of, tiny_base
from emulated_graphs import emulated_graphs
from torch import nn
from vit_cases import psnr, smooth_images

from r2f_ext.audit.assign import assign_groups
from r2f_ext.capture import Capture
from r2f_ext.errors import R2FError
from r2f_ext.inversion import matching
from r2f_ext.inversion.exact_gradients import exact_gradients
from r2f_ext.inversion.matching import SCHEDULES, MatchingConfig, match
from r2f_ext.inversion.objectives import Distance, GradientObjective, UpdateObjective
from r2f_ext.pairs.simulation import Training, simulate
from r2f_ext.types import BaseModel, FactoredGradient, Gradient, Reconstruction

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


def conv_base(dtype=torch.float64):
    """A small smooth convolutional classifier with batch norm in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
        nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 4, 5),
    )  # fmt: skip
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return BaseModel(model.to(dtype).eval().requires_grad_(False), "conv", (3, 8, 8), (0.4,) * 3, (0.3,) * 3, 5)


def conv_world(victims=2, batch=1, dtype=torch.float64):
    base = conv_base(dtype)
    images = smooth_images(victims * batch, 8).to(dtype).unflatten(0, (victims, batch))
    labels = torch.arange(victims * batch).unflatten(0, (victims, batch)) % 5
    parameters = dict(base.model.named_parameters())
    observed = {name: [] for name in parameters}
    for image, label in zip(images, labels, strict=True):
        for parameter in parameters.values():
            parameter.requires_grad_()
        loss = F.cross_entropy(base.model(base.normalize(image)), label)
        for name, gradient in zip(observed, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            observed[name].append(gradient)
    base.model.requires_grad_(False)
    return base, Gradient({name: torch.stack(each) for name, each in observed.items()}), images, labels


def run(world, config=CONFIG, start=None, **more):
    model, observed, images, labels = world
    start = torch.full_like(images, 0.5) if start is None else start
    return match(model, GradientObjective(observed), start, labels, config, "matching", "a test", **more)


def losses(world, images):
    target, observed, _, labels = world
    with Capture(target) as capture:
        factors = capture(images[:, None], labels[:, None])
    distance = Distance(CONFIG.loss, [1.0] * len(LINEAR), CONFIG.tv_weight, CONFIG.isotropic)
    return GradientObjective(observed)(factors, images, distance)


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
    wild = MatchingConfig(steps=6, step_size=0.5, tv_weight=0.0)
    assert torch.equal(run(world, wild, start=world[2]).images, world[2])


def test_it_repeats_itself(world):
    config = replace(CONFIG, restarts=2)
    first, again, other = run(world, config), run(world, config), run(world, replace(config, seed=1))
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)


def test_victims_do_not_disturb_one_another(world):
    target, observed, images, labels = world
    together = run(world).images
    alone = run((target, Gradient({n: g[1:2] for n, g in observed.dense.items()}), images[1:2], labels[1:2])).images
    # A sign may flip where a derivative is next to zero: nearly all pixels agree.
    assert ((alone[0] - together[1]).abs() < 1e-4).float().mean() > 0.97


def test_no_steps_is_the_start(world):
    assert torch.equal(run(world, MatchingConfig(steps=0)).images, torch.full((3, 3, 16, 16), 0.5))


def test_a_warm_start_from_another_route(world):
    other = Reconstruction("amortised", (world[2] + 0.02).clamp(0, 1), world[3], "", 0.0)
    found, cold = run(world, start=other), run(world)
    assert found.details["loss_start"] < 0.2 * cold.details["loss_start"]
    assert psnr(found.images, world[2]) > psnr(cold.images, world[2]) + 10


@pytest.mark.parametrize("optimizer", ["signed_adam", "adam", "lbfgs"])
@pytest.mark.parametrize("loss", ["layer_cosine", "cosine", "l2"])
def test_every_optimizer_lowers_every_loss(optimizer, loss):
    world = conv_world()
    config = MatchingConfig(steps=25, step_size=0.03, tv_weight=1e-4, optimizer=optimizer, loss=loss, schedule="cosine")
    found = run(world, config)
    assert found.images.shape == world[2].shape
    assert found.details["loss_end"] < 0.5 * found.details["loss_start"]
    assert found.images.min() >= 0 and found.images.max() <= 1


def test_lbfgs_recovers_small_images():
    """A smooth net's dense exact gradients give the pixels back."""
    world = conv_world()
    config = MatchingConfig(steps=400, step_size=0.1, tv_weight=0.0, optimizer="lbfgs", loss="layer_cosine")
    assert psnr(run(world, config).images.flatten(0, 1), world[2].flatten(0, 1)) > 40


def test_restarts_are_one_batch_and_the_best_of_them_wins():
    """Each trial of a batch ends where it would have ended alone; a victim gets its best one."""
    world = conv_world()
    config = MatchingConfig(steps=20, step_size=0.05, tv_weight=1e-3, restarts=4, spread=1.0)
    base, observed, images, labels = world
    together = run(world, config)
    ends = []
    for trial in _starts_of(torch.full_like(images, 0.5), config):
        ends.append(run(world, replace(config, restarts=1), start=trial))
    best = min(end.details["loss_end"] for end in ends)
    assert together.details["loss_end"] <= best + 1e-9  # the mean of each victim's best
    assert together.details["restarts"] == 4
    victim = (base, Gradient({n: g[:1] for n, g in observed.dense.items()}), images[:1], labels[:1])
    alone = [run(victim, replace(config, restarts=1), start=end[:1]) for end in _starts_of(images * 0 + 0.5, config)]
    winner = min(alone, key=lambda end: end.details["loss_end"])
    assert ((winner.images[0] - together.images[0]).abs() < 1e-4).float().mean() > 0.97


def _starts_of(start, config):
    """The documented starts: the given one, then start + spread (u - start)."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (len(start), config.restarts - 1, *start.shape[1:])
    noise = torch.rand(shape, generator=generator, dtype=torch.float64).to(start)
    others = start[:, None] + config.spread * (noise - start[:, None])
    return [start, *others.unbind(1)]


def test_layer_weights_and_layers_left_out(world):
    target, observed, images, labels = world
    only = Gradient({LINEAR[0]: observed.dense[LINEAR[0]]})
    a = run((target, only, images, labels))
    b = run(world, replace(CONFIG, layer_weights={LINEAR[1]: 0.0}))
    assert ((a.images - b.images).abs() < 1e-4).float().mean() > 0.97
    assert not torch.allclose(a.images, run(world).images, atol=1e-2)


def test_observed_factors_equal_observed_dense_gradients(world):
    target, _, images, labels = world
    with Capture(target) as capture:
        factors = capture(images[:, None], labels[:, None])
    found, expected = run((target, factors, images, labels)), run(world)
    assert ((found.images - expected.images).abs() < 1e-4).float().mean() > 0.97
    config = replace(CONFIG, restarts=2)
    assert run((target, factors, images, labels), config).details["loss_end"] <= found.details["loss_end"] + 1e-6


def test_a_lora_update_is_matched(world):
    target, observed, images, labels = world
    a = {layer.name: torch.randn(layer.rank, layer.d_in) for layer in target.layers}
    objective = UpdateObjective(target, a, {n: 3 * g @ a[n].mT for n, g in observed.dense.items()})
    start = torch.full_like(images, 0.5)
    config = replace(CONFIG, restarts=2, spread=0.5)
    found = match(target, objective, start, labels, config, "amortised_refined", "")
    assert found.details["loss_end"] < found.details["loss_start"] - 0.05
    central = match(target, objective, start, labels, replace(config, second_order="central_differences"), "", "")
    assert central.details["loss_end"] == pytest.approx(found.details["loss_end"], rel=0.05)


@pytest.mark.parametrize("kind", ["layers", "parameters"])
def test_central_differences_equal_double_backward(kind, world):
    if kind == "layers":
        base = tiny_base()
        images, labels = samples(2, base)
        with Capture(target_of(base, LINEAR)) as capture:
            factors = capture(images[:, None], labels[:, None])
        case = (target_of(base, LINEAR), Gradient({n: factors.dense(n) for n in LINEAR}), images, labels)
    else:
        case = conv_world()
    config = MatchingConfig(steps=8, step_size=0.02, tv_weight=0.01, optimizer="adam", restarts=2)
    exact = run(case, replace(config, second_order="double_backward"))
    central = run(case, replace(config, second_order="central_differences"))
    torch.testing.assert_close(central.images, exact.images, atol=1e-5, rtol=0)
    assert (exact.details["central_differences"], central.details["central_differences"]) == (0, 1)


@pytest.mark.parametrize("second_order", ["double_backward", "central_differences"])
@pytest.mark.parametrize("optimizer", ["signed_adam", "lbfgs"])
@pytest.mark.parametrize("kind", ["layers", "parameters", "update"])
def test_evaluations_that_are_replayed_give_the_search_of_calls(kind, optimizer, second_order, device, monkeypatch):
    """On a GPU they are captured, on a CPU in emulation; in float64, so that rounding does not turn a sign."""
    base = conv_base() if kind == "parameters" else tiny_base()
    base.model.to(device)
    images, labels = (each.to(device) for each in samples(2, base))
    if kind == "parameters":
        names = [name for name, _ in base.model.named_parameters()]
        taken = exact_gradients(base, images, labels, names)
        model, objective = base, GradientObjective(Gradient({n: torch.stack([one[n] for one in taken]) for n in names}))
    else:
        model = target_of(base, LINEAR)
        with Capture(model) as capture:
            factors = capture(images[:, None], labels[:, None])
        a = {layer.name: torch.randn(layer.rank, layer.d_in).to(images) for layer in model.layers}
        updates = {n: factors.dense(n) @ a[n].mT for n in LINEAR}
        objective = UpdateObjective(model, a, updates) if kind == "update" else GradientObjective(factors)
    config = replace(CONFIG, optimizer=optimizer, second_order=second_order, restarts=2, steps=15, tv_weight=0.01)
    start = torch.full_like(images, 0.5)
    with emulated_graphs() if device.type == "cpu" else nullcontext() as captures:
        replayed = match(model, objective, start, labels, config, "", "")
    assert captures is None or list(captures) == [True]
    monkeypatch.setattr(matching, "Replayed", lambda function: function)
    called = match(model, objective, start, labels, config, "", "")
    assert replayed.details["loss_end"] < replayed.details["loss_start"]
    assert replayed.details == pytest.approx(called.details, rel=1e-6)
    assert ((replayed.images - called.images).abs() < 1e-6).double().mean() > 0.99


class FusedAttention(nn.Module):
    """One attention of the fused kind, which has no double backward, on tokens of 4x4 patches."""

    def __init__(self):
        super().__init__()
        self.patch, self.qkv, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).mT
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))


def test_a_model_without_double_backward_is_noticed():
    torch.manual_seed(0)
    base = BaseModel(FusedAttention().eval().requires_grad_(False), "fused", (3, 16, 16), (0.5,) * 3, (0.5,) * 3, 5)
    images, labels = smooth_images(2, 16), torch.tensor([1, 3])
    with Capture(target_of(base, ("qkv", "head"))) as capture:
        observed = capture(images[:, None], labels[:, None])
    world = (target_of(base, ("qkv", "head")), observed, images, labels)
    found = run(world, MatchingConfig(steps=20, tv_weight=1e-3))
    assert found.details["central_differences"] == 1
    assert found.details["loss_end"] < 0.7 * found.details["loss_start"]
    with pytest.raises(RuntimeError, match="not implemented"):
        run(world, MatchingConfig(steps=1, second_order="double_backward"))


def test_a_net_of_kinks_is_noticed_and_better_matched_by_central_differences():
    """ReLU and max-pooling: the gradient jumps where units switch, and second derivatives do not see it."""
    torch.manual_seed(0)
    layers = []
    for width in (3, 16, 16, 16):
        layers += [nn.Conv2d(width, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 5))
    world = conv_world(dtype=torch.float32)
    base = BaseModel(model.eval().requires_grad_(False), "kinks", (3, 8, 8), (0.5,) * 3, (0.25,) * 3, 5)
    names = [name for name, _ in model.named_parameters()]
    taken = exact_gradients(base, world[2][:, 0], world[3][:, 0], names)
    observed = Gradient({name: torch.stack([one[name] for one in taken]) for name in names})
    config = MatchingConfig(steps=30, step_size=0.02, tv_weight=0.0, schedule="cosine")
    case, start = (base, observed, world[2], world[3]), torch.rand_like(world[2])
    found = run(case, config, start=start)
    double = run(case, replace(config, second_order="double_backward"), start=start)
    assert (found.details["central_differences"], double.details["central_differences"]) == (1, 0)
    assert found.details["loss_end"] < double.details["loss_end"]
    smooth = run(world, config, start=start)
    assert smooth.details["central_differences"] == 0


def test_a_batch_is_found_up_to_its_order():
    world = conv_world(victims=2, batch=2)
    config = MatchingConfig(steps=300, step_size=0.1, tv_weight=0.0, optimizer="lbfgs")
    found = run(world, config)
    assert found.images.shape == (2, 2, 3, 8, 8)
    swapped = found.images.flip(1)
    matched = assign_groups(swapped, world[2])
    torch.testing.assert_close(matched, assign_groups(found.images, world[2]))
    before = psnr(assign_groups(torch.full_like(world[2], 0.5), world[2]).flatten(0, 1), world[2].flatten(0, 1))
    assert psnr(matched.flatten(0, 1), world[2].flatten(0, 1)) > before + 6


def test_an_average_over_steps_is_a_group_of_all_their_images():
    """Eq. 6: the mean gradient of two steps of training, against the images of both at the start's weights."""
    base = tiny_base()
    target = target_of(base, LINEAR)
    images, labels = samples(4, base)
    images, labels = images.unflatten(0, (2, 2)), labels.unflatten(0, (2, 2))
    a = {layer.name: torch.randn(layer.rank, layer.d_in).double() for layer in target.layers}
    training = Training(steps=2, batch=1, samples=2, lr=1e-5)
    average = simulate(target, a, images, labels, training).gradient
    warm = (images + 0.05 * torch.randn_like(images)).clamp(0, 1)
    exact = MatchingConfig(steps=0, tv_weight=0.0)
    case = (target, average, images, labels)
    assert run(case, exact, start=images).details["loss_end"] < 1e-3
    found = run(case, MatchingConfig(steps=40, step_size=0.02, tv_weight=0.0, schedule="cosine"), start=warm)
    assert found.details["loss_end"] < 0.05 * found.details["loss_start"]


class Cut(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["signed_adam", "lbfgs"])
def test_it_goes_on_where_it_was_cut_off_to_the_same_bits(optimizer, tmp_path):
    world, state = conv_world(dtype=torch.float32), tmp_path / "search.safetensors"
    config = MatchingConfig(steps=40, restarts=2, optimizer=optimizer, patience=1000)
    whole = run(world, config)
    steps = []

    def cut():
        steps.append(1)
        if len(steps) == 27:
            raise Cut

    with pytest.raises(Cut):
        run(world, config, on_step=cut, state=state)
    left = []
    rest = run(world, config, on_step=lambda: left.append(1), state=state)
    assert len(left) == 20  # saved after 20 steps
    assert torch.equal(rest.images, whole.images) and rest.details == whole.details
    with pytest.raises(R2FError, match="another search"):
        run(world, replace(config, seed=5), state=state)
    state.write_bytes(b"not a state")
    with pytest.raises(R2FError, match="not the state"):
        run(world, config, state=state)


def test_it_stops_when_nothing_gets_better():
    world = conv_world()
    found = run(world, MatchingConfig(steps=500, patience=20, step_size=0.5, schedule="constant"), start=world[2])
    assert found.details["steps"] == 30  # seen to be best at 10, given up 20 later
    found = run(world, MatchingConfig(steps=40, patience=10, tolerance=1e-9, step_size=0.01))
    assert found.details["steps"] == 40


def test_without_a_box_pixels_may_leave_it(world):
    config = MatchingConfig(steps=4, step_size=0.4, low=None, high=None, schedule="constant", tv_weight=0.0)
    seen = []
    run(world, config, start=torch.ones_like(world[2]), watch=seen.append)
    assert len(seen) == 4 and seen[0].shape == (3, 1, 3, 16, 16)
    assert torch.stack(seen).max() > 1 or torch.stack(seen).min() < 0


def test_schedules():
    assert [SCHEDULES["step"](k, 80) for k in (0, 29, 30, 50, 70)] == pytest.approx([1, 1, 0.1, 0.01, 0.001])
    assert [SCHEDULES["cosine"](k, 4) for k in (0, 2, 4)] == pytest.approx([1, 0.5, 0])
    assert [SCHEDULES["linear"](k, 4) for k in (0, 3)] == pytest.approx([1, 0.25])
    assert SCHEDULES["constant"](3, 4) == 1


def test_an_observed_nan_is_one_error(world):
    world[1].dense[LINEAR[0]][1, 0, 0] = float("nan")
    with pytest.raises(R2FError, match=f"{LINEAR[0]} is not finite"):
        run(world)


def test_a_converged_model_is_reported(world):
    for gradient in world[1].dense.values():
        gradient[2] = 0
    with pytest.raises(R2FError, match=r"victim 2 is zero.*converged"):
        run(world)


def test_what_does_not_fit_is_refused(world):
    target, observed, images, labels = world
    cases = [
        ((target, Gradient({}), images, labels), "nothing was observed"),
        (
            (target, Gradient({"blocks.7.attn.qkv": observed.dense[LINEAR[0]]}), images, labels),
            "no layer of the target",
        ),
        ((target, Gradient({LINEAR[0]: observed.dense[LINEAR[0]][:, :, 1:]}), images, labels), "pass its own base"),
        ((target, Gradient({n: g[:2] for n, g in observed.dense.items()}), images, labels), "2 victims"),
        ((target, observed, images[..., 1:], labels), "does not fit the base's input"),
        ((target, observed, images, labels[:2]), "does not fit the base's input"),
        ((target, observed, images[:0], labels[:0]), "at least one victim"),
        ((target, observed, images, labels + 5), "from 0 to 4"),
        ((target, observed, images, labels - 9), "from 0 to 4"),
        ((target, observed, images, labels.float()), "from 0 to 4"),
        ((target, observed, images * float("nan"), labels), "start of the search is not finite"),
        ((target.base, Gradient({"nope": observed.dense[LINEAR[0]]}), images, labels), "no parameter nope"),
    ]
    for case, words in cases:
        with pytest.raises(R2FError, match=words):
            run(case, start=case[2])
    with pytest.raises(R2FError, match=r"layer_weights names x"):
        run(world, replace(CONFIG, layer_weights={"x": 1.0}))
    with pytest.raises(R2FError, match="all zero"):
        run(world, replace(CONFIG, layer_weights=dict.fromkeys(LINEAR, 0.0)))
    base, dense, conv_images, conv_labels = conv_world()
    base.model.train()
    with pytest.raises(R2FError, match="training mode"):
        run((base, dense, conv_images, conv_labels))
    with pytest.raises(R2FError, match="does not fit its A"):
        UpdateObjective(target, {LINEAR[0]: torch.ones(4, 24)}, {LINEAR[0]: torch.ones(1, 72, 3)})


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1}, {"step_size": 0.0}, {"tv_weight": -1.0}, {"schedule": "x"}, {"loss": "x"}, {"optimizer": "x"},
        {"low": None}, {"low": 1.0}, {"restarts": 0}, {"second_order": "x"}, {"patience": 0},
        {"layer_weights": {"a": -1.0}},
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(R2FError, match=next(iter(wrong)) if wrong != {"low": 1.0} else "box"):
        MatchingConfig(**wrong)


def test_exact_gradients_of_phase0_are_matched(world):
    """The dictionaries of `exact_gradients`, any subset of parameters, biases and norms too."""
    base = world[0].base
    names = ["blocks.0.attn.qkv.weight", "blocks.0.norm1.bias", "pos_embed"]
    taken = exact_gradients(base, world[2], world[3], names)
    observed = Gradient({name: torch.stack([one[name] for one in taken]) for name in names})
    found = run((base, observed, world[2], world[3]), MatchingConfig(steps=0, tv_weight=0.0), start=world[2])
    assert found.details["loss_end"] < 1e-5
    assert run((base, observed, world[2], world[3])).details["loss_end"] < 0.9
    assert isinstance(observed, Gradient) and not isinstance(observed, FactoredGradient)

"""Simulated victims against real ones, trained one by one by PEFT and torch.optim."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import CONV, cosine, peft_factors, peft_model, peft_start, proxy_set, samples, tiny_base

from r2f_ext.errors import R2FError
from r2f_ext.pairs import GeneratedPairs, SimulatedPairs, Training, simulate, write_pairs

VICTIMS = 8
BLOCKS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
RECIPES = {
    "one step": (Training(), {}),
    "five steps": (Training(steps=5), {}),
    "batches of two from three": (Training(steps=4, batch=2, samples=3), {}),
    "momentum, decay, cosine": (Training(steps=5, momentum=0.9, weight_decay=0.05, schedule="cosine"), {}),
    "adamw, linear": (Training(steps=5, optimizer="adamw", lr=0.01, weight_decay=0.1, schedule="linear"), {}),
    "rsLoRA, some layers": (Training(steps=3), {"use_rslora": True, "target_modules": ["attn.proj", "head"]}),
    "convolution": (Training(steps=3, batch=2), {"target_modules": [CONV, "mlp.fc1"]}),
}


def train_one(base, target, images, labels, training, **lora):
    """One PEFT victim by torch.optim and torch's schedules: factors, and full gradients averaged over the steps."""
    model = peft_model(base, **lora)
    factors = [p for p in model.parameters() if p.requires_grad]
    if training.optimizer == "adamw":
        optimizer = torch.optim.AdamW(factors, lr=training.lr, weight_decay=training.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            factors, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay
        )
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if training.schedule == "linear":
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=training.steps)
    if training.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=training.steps)
    weights = {n: model.base_model.model.get_submodule(n).base_layer.weight.requires_grad_() for n in target.names}
    total = {n: torch.zeros_like(w) for n, w in weights.items()}
    for step in range(training.steps):
        index = training.batch_of(step)
        model.zero_grad()
        F.cross_entropy(model(base.normalize(images[index])), labels[index]).backward()
        for name, weight in weights.items():
            total[name] += weight.grad / training.steps
        optimizer.step()
        schedule.step()
    return {name: peft_factors(model, name)[:2] for name in target.names}, total


@pytest.mark.parametrize(("training", "lora"), RECIPES.values(), ids=RECIPES.keys())
def test_eight_victims_equal_eight_of_peft(training, lora):
    base, lora = tiny_base(), {"target_modules": BLOCKS, **lora}
    target, a = peft_start(base, **lora)
    images, labels = samples(VICTIMS * training.owned, base)
    images, labels = (t.unflatten(0, (VICTIMS, training.owned)) for t in (images, labels))
    found = simulate(target, a, images, labels, training)
    for victim in range(VICTIMS):
        factors, gradients = train_one(base, target, images[victim], labels[victim], training, **lora)
        for name in target.names:
            expected_a, expected_b = factors[name]
            torch.testing.assert_close(found.a[name][victim], expected_a, rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(found.b[name][victim], expected_b, rtol=1e-7, atol=1e-10)
            expected = gradients[name].flatten(1)
            torch.testing.assert_close(found.gradient.dense(name)[victim], expected, rtol=1e-7, atol=1e-10)
            assert expected_b.any() and (training.steps == 1 or not torch.equal(expected_a, a[name]))


def test_victims_may_start_from_a_trained_adapter():
    """PEFT's own random B (init_lora_weights=False), as a server's adapter that its clients train on."""
    base, lora = tiny_base(), {"target_modules": BLOCKS, "init_lora_weights": False}
    target, a = peft_start(base, **lora)
    model = peft_model(base, **lora)
    b = {name: peft_factors(model, name)[1].clone() for name in target.names}
    training = Training(steps=3, momentum=0.9)
    images, labels = samples(2, base)
    found = simulate(target, a, images[:, None], labels[:, None], training, b=b)
    for victim in range(2):
        factors, gradients = train_one(base, target, images[victim][None], labels[victim][None], training, **lora)
        for name in target.names:
            assert b[name].any()
            for got, expected in zip((found.a[name], found.b[name]), factors[name], strict=True):
                torch.testing.assert_close(got[victim], expected, rtol=1e-7, atol=1e-10)
            expected = gradients[name].flatten(1)
            torch.testing.assert_close(found.gradient.dense(name)[victim], expected, rtol=1e-7, atol=1e-10)


def test_dense_gradients_are_the_factors_product():
    base = tiny_base()
    target, a = peft_start(base, target_modules=[CONV, "mlp.fc1"])
    images, labels = samples(6, base)
    images, labels = images.unflatten(0, (3, 2)), labels.unflatten(0, (3, 2))
    training = Training(steps=4, batch=2)
    factored, dense = (simulate(target, a, images, labels, training, dense=dense) for dense in (False, True))
    for layer in target.layers:
        assert dense.gradient.x[layer.name].shape == (3, layer.d_out, layer.d_in)
        torch.testing.assert_close(dense.gradient.dense(layer.name), factored.gradient.dense(layer.name))
        assert torch.equal(dense.b[layer.name], factored.b[layer.name])


def test_bfloat16_victims_end_near_the_float32_ones(bound, proxy):
    target, update = bound
    few, training = proxy.take(torch.arange(16)), Training(steps=5)
    (exact,), (rounded,) = (
        SimulatedPairs(target, update.a, few, training, precision=p).batches() for p in ("float32", "bfloat16")
    )
    for name in target.names:
        for got, expected in (
            (rounded.updates[name], exact.updates[name]),
            (rounded.gradients.dense(name), exact.gradients.dense(name)),
        ):
            assert got.dtype == torch.float32 and not torch.equal(got, expected)
            assert cosine(got.flatten(1), expected.flatten(1)).mean() >= 0.999


def test_pairs_of_victims_with_their_own_a(bound, proxy):
    """Each pair is the victim that trains alone from its a0, and A after the steps is kept."""
    target, update = bound
    pairs = SimulatedPairs(target, update.a, proxy.take(torch.arange(4)), Training(steps=2), per_victim_a=7)
    (batch,) = pairs.batches()
    (part,) = pairs.batches(2, 4)
    for name in target.names:
        assert torch.equal(part.a0[name], batch.a0[name][2:]) and not torch.equal(batch.a0[name][0], batch.a0[name][1])
    for victim in range(4):
        start = {name: a[victim] for name, a in batch.a0.items()}
        alone = simulate(target, start, batch.images[victim][None], batch.labels[victim][None], pairs.training)
        for name in target.names:
            torch.testing.assert_close(batch.a[name][victim], alone.a[name][0], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(batch.updates[name][victim], alone.b[name][0] / -0.2, rtol=1e-3, atol=1e-6)


def test_every_victim_may_start_from_its_own_a():
    base = tiny_base()
    target, a = peft_start(base, target_modules=BLOCKS)
    images, labels = samples(2, base)
    own = {name: torch.stack([each, each.flip(1)]) for name, each in a.items()}
    together = simulate(target, own, images[:, None], labels[:, None], Training(steps=3))
    for victim in range(2):
        one = slice(victim, victim + 1)
        start = {name: each[victim] for name, each in own.items()}
        alone = simulate(target, start, images[one, None], labels[one, None], Training(steps=3))
        for name in target.names:
            torch.testing.assert_close(together.b[name][one], alone.b[name])


def test_one_step_of_sgd_makes_the_generated_pairs(bound, proxy):
    target, update = bound
    few = proxy.take(torch.arange(6))
    (simulated,) = SimulatedPairs(target, update.a, few, Training(batch=2, lr=0.3)).batches()
    (generated,) = GeneratedPairs(target, update.a, few, group_size=2).batches()
    for name in target.names:
        torch.testing.assert_close(simulated.updates[name], generated.updates[name], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(simulated.gradients.dense(name), generated.gradients.dense(name))


def test_pairs_do_not_depend_on_how_they_are_walked(bound, proxy):
    target, update = bound
    pairs = SimulatedPairs(target, update.a, proxy.take(torch.arange(12)), Training(steps=2, samples=2))
    assert len(pairs) == 6
    (whole,), parts = pairs.batches(), [*pairs.batches(0, 2), *pairs.batches(2)]
    assert [len(part.labels) for part in parts] == [2, 4]
    for name in target.names:
        got = torch.cat([part.updates[name] for part in parts])
        assert float(cosine(got, whole.updates[name]).min()) > 1 - 1e-6


def test_dropout_keeps_the_mean_and_follows_its_seed():
    base = tiny_base(torch.float32)
    target, a = peft_start(base, target_modules=["attn.proj"])
    images, labels = samples(1, base, torch.float32)
    images, labels = images[:, None].expand(400, -1, -1, -1, -1), labels[:, None].expand(400, -1)
    plain = simulate(target, a, images[:1], labels[:1], Training())
    dropped = [simulate(target, a, images, labels, Training(dropout=0.5), seed) for seed in (1, 1, 2)]
    for name in target.names:
        assert torch.equal(dropped[0].b[name], dropped[1].b[name])
        assert not torch.equal(dropped[0].b[name], dropped[2].b[name])
        assert float(cosine(dropped[0].b[name].mean(0, keepdim=True), plain.b[name])) > 0.97
        assert float(cosine(dropped[0].b[name][:1], plain.b[name])) < 0.97


def test_the_random_state_outside_is_left_alone(bound, proxy):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    next(SimulatedPairs(bound[0], bound[1].a, proxy, Training(dropout=0.1)).batches(0, 2))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 3, "samples": 2}, "samples is 2"),
        ({"optimizer": "lion"}, "optimizer is 'lion': sgd or adamw"),
        ({"lr": math.nan}, "lr is nan"),
        ({"momentum": -1.0}, "momentum is -1.0"),
        ({"momentum": 0.5, "optimizer": "adamw"}, "momentum belongs to sgd"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"schedule": "steps"}, "schedule is 'steps': one of constant, linear, cosine"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_senseless_trainings_are_refused(words, said):
    with pytest.raises(R2FError, match=said):
        Training(**words)


def test_too_small_a_proxy_is_refused(bound, embedded):
    with pytest.raises(R2FError, match="has 3 images: at least 4 are needed"):
        SimulatedPairs(bound[0], bound[1].a, proxy_set(3, embedded), Training(samples=2))


def test_victims_whose_training_diverges_are_refused(tmp_path):
    """The number of the victim and of the step are those at which B is first not finite, found here step by step."""
    base = tiny_base(torch.float32)
    target, a = peft_start(base, target_modules=BLOCKS)
    proxy = proxy_set(12, base)
    training = Training(steps=6, lr=1e9)
    pairs = SimulatedPairs(target, a, proxy, training)
    with pytest.raises(R2FError, match="smaller learning rate") as caught:
        write_pairs(pairs, 12, tmp_path, lambda units: None)
    victim, step = (int(number) for number in re.search(r"victim (\d+) .* step (\d+) of 6", str(caught.value)).groups())
    images, labels = proxy.batch(slice(None))[:, None], proxy.labels[:, None]
    steps_until_not_finite = {}
    for steps in range(1, 7):
        found = simulate(target, a, images, labels, replace(training, steps=steps))
        for each in range(12):
            if not all(b[each].isfinite().all() for b in found.b.values()):
                steps_until_not_finite.setdefault(each, steps)
    assert min(steps_until_not_finite) == victim and steps_until_not_finite[victim] == step
    assert not list(tmp_path.iterdir())

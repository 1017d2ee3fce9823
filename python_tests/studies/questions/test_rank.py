import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from r2f_ext.inversion.exactness import in_float64
from r2f_ext.pairs import Training, simulate
from r2f_ext.studies import CLOTHES, Row, Table, World
from r2f_ext.studies.questions.rank import Rank, by_movement, misfit_of_a
from r2f_ext.studies.scene import base_of, mean_cosine, private_images, start_of, target_of
from r2f_ext.types import Gradient

WORLD = World(quick=True)
LAYERS = ["blocks.1.mlp.fc1", "blocks.3.attn.proj"]


def row(metric, values, **keys):
    return Row(keys, metric, tuple(values), min(values), max(values))


def trained(rank, training, dtype=torch.float64):
    base = base_of(WORLD.base, WORLD.device)
    target = in_float64(target_of(base, rank, LAYERS)) if dtype == torch.float64 else target_of(base, rank, LAYERS)
    a = start_of(target, 0)
    private = private_images(base, CLOTHES, 0, 2)
    images, labels = private.batch(slice(None))[:, None].to(dtype), private.labels[:, None]
    return target, a, simulate(target, a, images, labels, training), images, labels


def test_two_steps_show_the_gradient_by_as_many_directions_as_the_rank():
    steps = Training(steps=2, lr=1e-4)  # so small that both steps have the same gradient
    for rank, least, most in ((64, 0.9999, 1.0 + 1e-6), (1, 0.1, 0.9)):
        target, a, victims, *_ = trained(rank, steps)
        true = Gradient({name: victims.gradient.dense(name) for name in target.names})
        found = by_movement(target, a, victims, steps)
        assert all(int(torch.linalg.matrix_rank(dense).max()) <= rank for dense in found.dense.values())
        cosine = mean_cosine(found, true)
        assert least < float(cosine.min()) and float(cosine.max()) < most


def test_one_step_moves_nothing_and_shows_nothing_by_movement():
    target, a, victims, *_ = trained(8, Training())
    found = by_movement(target, a, victims, Training())
    assert not any(dense.any() for dense in found.dense.values())


def test_the_misfit_is_that_of_pefts_own_gradient():
    recipe = Training(steps=3, lr=0.5, weight_decay=0.03)
    target, _, victims, images, labels = trained(4, recipe)
    after = simulate(target, victims.a, images, labels, replace(recipe, steps=1), b=victims.b)
    gradient = Gradient({name: after.gradient.dense(name) for name in target.names})
    model = copy.deepcopy(target.base.model)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=LAYERS)).double()
    missed = size = 0.0
    for name in LAYERS:
        layer = peft.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data = victims.a[name][0].clone()
        layer.lora_B["default"].weight.data = victims.b[name][0].clone()
    F.cross_entropy(peft(target.base.normalize(images[0])), labels[0]).backward()
    for name in LAYERS:
        weight = peft.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
        kept = recipe.weight_decay * weight.detach()
        missed, size = missed + float((kept + weight.grad).square().sum()), size + float(kept.square().sum())
    found = misfit_of_a(target, victims, gradient, recipe.weight_decay)
    assert float(found[0]) == pytest.approx((missed / size) ** 0.5, rel=1e-6)


def test_the_line_of_jang_counts_outputs_and_images():
    base = base_of(WORLD.base, WORLD.device)
    assert base.num_classes == 10
    settings = Rank().settings(replace(WORLD, quick=False))
    assert {(1, 64), (16, 1)} <= {(each["images"], each["rank"]) for each in settings}


def test_conclusions_follow_the_table():
    def of(projection, movement, misfit):
        steps = {"images": 1, "rank": 8, "steps": 300}
        return Table(
            [
                row("cosine", [projection], images=1, rank=64, decoder="projection"),
                row("cosine", [0.7], images=1, rank=64, decoder="sqrt(r / d_in)"),
                row("gradient_rank", [29.0, 30.0], images=1, rank=64),
                row("cosine", [movement, movement], images=1, rank=64, decoder="movement, float64"),
                row("jang", [208.0], images=1, rank=64),
                row("psnr_db", [20.0, 21.0], images=1, rank=64, route="amortised"),
                row("misfit", [misfit, misfit], **steps),
                row("start_left", [0.5, 0.5], **steps),
            ]
        )

    study = Rank()
    said = study.conclude(WORLD, of(0.66, 1.0, 0.9))
    assert "do not determine" in said[0]
    assert "from rank 64 on reaches" in said[1]
    assert any("amortised: 20.5" in one for one in said)
    assert "rank 8 A misses stationarity by 0.90" in said[-1]
    said = study.conclude(WORLD, of(1.0, 0.9, 0.01))
    assert "A determine the" in said[0]
    assert "stays below" in said[1]
    assert "stationarity by 0.01" in said[-1]
    assert study.conclude(WORLD, Table([])) == []

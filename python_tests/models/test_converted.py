"""PiSSA, OLoRA and plain LoRA that PEFT converts at saving, split again and held against PEFT and autograd."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import changed_weights, peft_factors, peft_model, samples, save, tiny_base
from torch import Tensor, nn

from r2f_ext.decoders import stack_updates
from r2f_ext.errors import R2FError
from r2f_ext.models import attach, evidence_of, read_adapter
from r2f_ext.models.evidence import CONVERTED, START_MOVES_A
from r2f_ext.types import BaseModel

NAMES = ("blocks.0.attn.qkv", "blocks.1.attn.qkv")
PATTERNS = {"rank_pattern": {"blocks.1.attn.qkv": 2}, "alpha_pattern": {"blocks.1.attn.qkv": 6}}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base(torch.float32)


def started(base: BaseModel, folder: Path, init: str | bool, **lora) -> tuple[nn.Module, dict[str, tuple]]:
    """A PEFT model, saved at its start as PEFT asks for it, and its factors there by layer."""
    model = peft_model(base, r=4, lora_alpha=8, init_lora_weights=init, **lora).eval()
    config = model.peft_config["default"]
    config.init_lora_weights = True
    save(model, folder)
    config.init_lora_weights = init
    return model, {name: tuple(t.clone() for t in peft_factors(model, name)[:2]) for name in NAMES}


def converted(model: nn.Module, start: Path, folder: Path) -> Path:
    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(start))
    return folder


def step(model: nn.Module, base: BaseModel, images: Tensor, labels: Tensor, kind=torch.optim.SGD, **options) -> None:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], **{"lr": 0.05, **options})
    F.cross_entropy(model(base.normalize(images)), labels).backward()
    optimizer.step()
    model.zero_grad()


def full_gradients(base: BaseModel, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """G of the public base, by autograd."""
    model = copy.deepcopy(base.model).requires_grad_(True)
    F.cross_entropy(model(base.normalize(images)), labels).backward()
    return {name: model.get_submodule(name).weight.grad for name in NAMES}


@pytest.mark.parametrize("init", ["pissa", "olora", True])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, PATTERNS], ids=["plain", "rslora", "patterns"])
def test_one_step_is_the_public_bases_gradient(init, lora, base, tmp_path):
    model, start = started(base, tmp_path / "start", init, **lora)
    images, labels = samples(1, base, torch.float32)
    expected = full_gradients(base, images, labels)
    step(model, base, images, labels)
    target, update = attach(read_adapter(converted(model, tmp_path / "start", tmp_path / "a")), base)
    observed = stack_updates([update])
    for layer in target.layers:
        a0, b0 = start[layer.name]
        a, b, scale = peft_factors(model, layer.name)
        assert layer.rank == len(a0) and layer.scale == pytest.approx(scale)
        assert update.a0 is not None and torch.equal(update.a0[layer.name], a0)
        assert torch.equal(update.a[layer.name], a) and torch.equal(update.b[layer.name], b - b0)
        projected = 0.05 * scale * expected[layer.name] @ a0.T
        gap = (observed[layer.name][0] - projected).norm() / projected.norm()
        assert gap < 2e-4, gap
        assert F.cosine_similarity(observed[layer.name].flatten(), projected.flatten(), dim=0) > 1 - 1e-5
    assert (update.b0 is None) == (init is True)
    assert all(torch.equal(half, start[name][1]) for name, half in (update.b0 or {}).items())
    found = evidence_of([update])
    assert (found.steps, found.start, found.signs_only) == (1, "known", False)
    assert (START_MOVES_A in found.sentences) == (init is not True)


def test_other_trainings_are_not_taken_for_one_plain_step(base, tmp_path):
    images, labels = samples(1, base, torch.float32)
    recipes = {
        "steps": lambda model: [step(model, base, images, labels) for _ in range(3)],
        "adamw": lambda model: step(model, base, images, labels, torch.optim.AdamW, lr=1e-3),
    }
    for name, train in recipes.items():
        model, start = started(base, tmp_path / f"{name}-start", "pissa")
        train(model)
        files = read_adapter(converted(model, tmp_path / f"{name}-start", tmp_path / name))
        _, update = attach(files, base)
        found = evidence_of([update])
        assert found.steps is None and found.sentences[0].startswith(f"{CONVERTED} otherwise")
        assert found.signs_only == (name == "adamw")
        delta = {n: update.b[n] + start[n][1] for n in NAMES}
        assert all(torch.allclose(delta[n], peft_factors(model, n)[1]) for n in NAMES)


def test_a_plain_start_in_the_file_is_known_after_many_steps(base, tmp_path):
    model, start = started(base, tmp_path / "start", True)
    images, labels = samples(1, base, torch.float32)
    for _ in range(3):
        step(model, base, images, labels)
    _, update = attach(read_adapter(converted(model, tmp_path / "start", tmp_path / "a")), base)
    assert update.b0 is None and all(torch.equal(update.start[name], start[name][0]) for name in NAMES)
    found = evidence_of([update])
    assert found.steps is None and found.sentences[0].startswith("A has moved from its known start")


@pytest.mark.parametrize("init", ["pissa", True])
def test_an_adapter_equal_to_its_start_is_unchanged(init, base, tmp_path):
    model, _ = started(base, tmp_path / "start", init)
    folder = converted(model, tmp_path / "start", tmp_path / "a")
    with pytest.raises(R2FError, match="unchanged: its B is the start" if init == "pissa" else "every B is zero"):
        attach(read_adapter(folder), base)


def test_files_without_their_start_stay_as_they_are(adapter_folder, embedded, tmp_path):
    target, update = attach(read_adapter(adapter_folder), embedded)
    assert update.a0 is update.b0 is None and {layer.rank for layer in target.layers} == {8}

    def doubled_a(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: w[:4].repeat(2, 1) if "lora_A" in n else w for n, w in weights.items()}

    folder = changed_weights(adapter_folder, tmp_path / "a", doubled_a)  # twice the same rows, but another B
    assert attach(read_adapter(folder), embedded)[1].a0 is None

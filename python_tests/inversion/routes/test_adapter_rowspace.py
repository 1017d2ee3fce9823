"""The adapter's row space, from PEFT folder to image."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import peft_model, save, train
from timm.models.vision_transformer import VisionTransformer

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.errors import R2FError
from r2f_ext.inversion.route import adapter_problem
from r2f_ext.inversion.routes import run_routes, verdicts_of
from r2f_ext.models import InitialFactors, attach, read_adapter
from r2f_ext.types import BaseModel, Reconstruction


@pytest.fixture(scope="module")
def base() -> BaseModel:
    """17 tokens of width 96, float64, one channel."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, in_chans=1, embed_dim=96, depth=2, num_heads=4, num_classes=5
    ).double()
    return BaseModel(model.eval().requires_grad_(False), "seventeen", (1, 32, 32), (0.5,), (0.5,), 5)


def taken(target, updates, folder=None, seed=None) -> tuple[Reconstruction | None, str]:
    """What the route made of the adapters, and why or why not."""
    problem = adapter_problem(target, updates, InitialFactors(target, updates[0], folder, seed))
    outcome = run_routes(problem, verdicts_of(problem), ["adapter_rowspace"])
    if not outcome.reconstructions:
        return None, outcome.not_run["adapter_rowspace"]
    return outcome.reconstructions[0], outcome.reconstructions[0].why


def _image() -> torch.Tensor:
    coarse = torch.rand(1, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return F.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def victim(base, tmp_path_factory):
    """r = 32, T = 5, float64, seed 42; the folder before training, too."""
    folder = tmp_path_factory.mktemp("row_space")
    image, label = _image(), torch.tensor([1])
    model = peft_model(base, seed=42, r=32, lora_alpha=64)
    save(model, folder / "start")
    train(model, base, image, label, steps=5)
    target, update = attach(read_adapter(save(model, folder / "end")), base)
    return image, target, update, folder


def test_five_steps_in_float64_give_the_image_with_a_guessed_seed(victim) -> None:
    image, target, update, _ = victim
    found, why = taken(target, [update])
    assert found is not None and psnr_db(found.images, image).item() >= 70
    for word in ("manual_seed(42)", "rank 32 against 17 tokens", "float64", "dB to be expected"):
        assert word in why
    assert found.details["expected_psnr_db"] > 40


def test_a_folder_or_a_seed_named_by_the_user_gives_the_same(victim) -> None:
    image, target, update, folder = victim
    for options in ({"folder": str(folder / "start")}, {"seed": 42}):
        found, _ = taken(target, [update], **options)
        assert found is not None and psnr_db(found.images, image).item() >= 70
    with pytest.raises(R2FError, match="--a0-seed 41 does not draw"):
        taken(target, [update], seed=41)


def test_a_start_that_the_file_holds_needs_no_guess(base, tmp_path) -> None:
    """PEFT's conversion at saving writes A_0 beside A; no common seed draws this one."""
    image, label = _image(), torch.tensor([1])
    model = peft_model(base, seed=424242, r=32, lora_alpha=64)
    save(model, tmp_path / "start")
    train(model, base, image, label, steps=5)
    model.save_pretrained(str(tmp_path / "end"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    target, update = attach(read_adapter(tmp_path / "end"), base)
    found, why = taken(target, [update])
    assert found is not None and psnr_db(found.images, image).item() >= 70 and "the adapter's own file" in why


def test_float32_storage_is_said_and_promises_less(victim) -> None:
    image, target, update, _ = victim
    stored = replace(update, a={n: a.float().double() for n, a in update.a.items()})
    found, why = taken(target, [stored])
    assert found is not None and "float32" in why
    psnr = psnr_db(found.images, image).item()
    assert psnr < 60 and found.details["expected_psnr_db"] < psnr + 6


def test_an_a_that_forgot_its_start_is_inverted_without_one(victim) -> None:
    """Weight decay leaves few directions of the inputs' span: here two of them stand for what it leaves."""
    _, target, update, _ = victim
    rows = torch.randn(32, 2, dtype=torch.float64) @ torch.randn(2, 96, dtype=torch.float64)
    decayed = replace(update, a={n: rows + 1e-7 * torch.rand_like(rows) for n in update.a})
    found, why = taken(target, [decayed])
    assert found is not None and "weight decay has made A forget it" in why
    assert found.details["expected_psnr_db"] < 25


def test_refusals_say_why(victim, base, tmp_path) -> None:
    _, target, update, _ = victim
    unknown = replace(update, a={n: a + torch.randn_like(a) for n, a in update.a.items()})
    assert "pass --initial FOLDER or --a0-seed N" in taken(target, [unknown])[1]
    image, label = _image(), torch.tensor([1])
    model = peft_model(base, r=8)
    train(model, base, image, label, steps=2)
    small = attach(read_adapter(save(model, tmp_path / "r8")), base)
    found, why = taken(small[0], [small[1]])
    assert found is None and "rank 8" in why


def test_adapters_of_one_start_have_figures_each(victim) -> None:
    _, target, update, _ = victim
    found, _ = taken(target, [update, update])
    assert found is not None and len(found.images) == 2 and found.per_victim["expected_psnr_db"].shape == (2,)

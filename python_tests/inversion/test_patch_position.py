import dataclasses

import pytest
import torch
from vit_cases import psnr, small_vit, smooth_images

from r2f_ext.errors import R2FError
from r2f_ext.inversion.exact_gradients import exact_gradients
from r2f_ext.inversion.patch_position import invert_patch_position
from r2f_ext.models.base import load_base
from r2f_ext.types import BaseModel

LAYER_SCALE = {"init_values": 1e-5, "pre_norm": True, "qk_norm": True}
NO_CLASS = {"class_token": False, "global_pool": "avg"}
REGISTERS = {"reg_tokens": 4, "no_embed_class": True, "dynamic_img_size": True}
REGISTERS_WITH_POSITIONS = {"reg_tokens": 2}


def _gradients(base: BaseModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    image = smooth_images(1, base.input_shape[1])
    return image, exact_gradients(base, image, torch.tensor([3]))[0]


def test_embedded_base_in_float32() -> None:
    image, gradients = _gradients(load_base("embedded"))
    found = invert_patch_position(load_base("embedded"), gradients)
    assert found.route == "patch_position" and found.images.shape == (1, 3, 32, 32)
    assert psnr(found.images, image) >= 80


@pytest.mark.parametrize("options", [{}, NO_CLASS, REGISTERS, REGISTERS_WITH_POSITIONS, LAYER_SCALE])
def test_every_token_layout_in_float64(options: dict) -> None:
    base = small_vit(**options)
    image, gradients = _gradients(base)
    # The images come back as float32, which is good for about 140 dB.
    assert psnr(invert_patch_position(base, gradients).images, image) >= 120


def test_half_precision_gradients_degrade_and_say_so() -> None:
    base = load_base("embedded")
    image, gradients = _gradients(base)
    exact = invert_patch_position(base, gradients)
    rounded = invert_patch_position(base, {name: g.bfloat16() for name, g in gradients.items()})
    assert 10 < psnr(rounded.images, image) < psnr(exact.images, image)
    assert rounded.details["expected_error"] > 100 * exact.details["expected_error"]


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda g: g * float("nan"), "NaN"),
        (lambda g: g * 0, "all zero"),
        (lambda g: g[..., :-1], "shape"),
        (None, "missing"),
    ],
)
def test_damaged_gradients_are_refused(name: str, damage, message: str) -> None:
    base = small_vit()
    gradients = _gradients(base)[1]
    if damage is None:
        del gradients[name]
    else:
        gradients[name] = damage(gradients[name])
    with pytest.raises(R2FError, match=f"{name}.*{message}"):
        invert_patch_position(base, gradients)


def test_refused_by_count() -> None:
    base = small_vit(embed_dim=12)
    with pytest.raises(R2FError, match="16 patches"):
        invert_patch_position(base, _gradients(base)[1])


def test_smaller_inputs_than_the_positions_were_made_for() -> None:
    """timm resamples 8x8 positions to 4x4 tokens; the tokens' gradients are solved back out of the positions'."""
    large = small_vit(img_size=32, dynamic_img_size=True)
    base = dataclasses.replace(large, input_shape=(3, 16, 16))
    image, gradients = _gradients(base)
    assert gradients["pos_embed"].shape == (1, 65, 96)
    # timm resamples in float32, in float64 models too.
    assert psnr(invert_patch_position(base, gradients).images, image) >= 80


def test_larger_inputs_than_the_positions_were_made_for_are_refused() -> None:
    base = dataclasses.replace(small_vit(dynamic_img_size=True), input_shape=(3, 32, 32))
    with pytest.raises(R2FError, match="64 tokens were blended into those of 16 positions"):
        invert_patch_position(base, _gradients(base)[1])
    base = dataclasses.replace(small_vit(), input_shape=(3, 32, 32))
    with pytest.raises(R2FError, match="dynamic_img_size"):
        invert_patch_position(base, {})


def test_expected_figure_is_near_the_true_one() -> None:
    base = load_base("embedded")
    image, gradients = _gradients(base)
    found = invert_patch_position(base, {name: g.bfloat16() for name, g in gradients.items()})
    assert abs(found.details["expected_psnr_db"] - psnr(found.images, image)) < 6

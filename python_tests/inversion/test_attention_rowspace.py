import dataclasses

import pytest
import torch
from timm.layers import RmsNorm
from timm.models.vision_transformer import ResPostBlock
from vit_cases import psnr, small_vit, smooth_images

from r2f_ext.errors import R2FError
from r2f_ext.inversion.attention_rowspace import (
    complement,
    invert_attention_rowspace,
    token_map,
    weighted_directions,
)
from r2f_ext.inversion.exact_gradients import exact_gradients
from r2f_ext.inversion.geometry import QKV_WEIGHT, base_geometry
from r2f_ext.inversion.patches import unfold_patches
from r2f_ext.models.base import load_base
from r2f_ext.types import BaseModel

LAYOUTS = [
    {},
    {"class_token": False, "global_pool": "avg"},
    {"reg_tokens": 4, "no_embed_class": True, "dynamic_img_size": True},
    {"reg_tokens": 2},
    {"pre_norm": True},
    {"norm_layer": RmsNorm},
    {"block_fn": ResPostBlock, "init_values": 1e-2},
    {"img_size": 24, "dynamic_img_size": True},  # read at 16x16: positions are resampled
]


def _case(options: dict) -> BaseModel:
    return dataclasses.replace(small_vit(**options), input_shape=(3, 16, 16))


@pytest.mark.parametrize("options", LAYOUTS)
def test_token_map_describes_the_inputs_of_qkv(options: dict) -> None:
    base = _case(options)
    geometry = base_geometry(base)
    seen: list[torch.Tensor] = []
    handle = base.model.blocks[0].attn.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    inputs = base.normalize(smooth_images(1, 16).double())
    base.model(inputs)
    handle.remove()
    tokens = token_map(base, geometry)
    torch.testing.assert_close(seen[0][: geometry.prefix_tokens], tokens.known)
    # Each patch token is a combination of its affine part and the shifts.
    affine = unfold_patches(inputs, geometry.patch)[0] @ tokens.linear.T + tokens.offset
    for n, token in enumerate(seen[0][geometry.prefix_tokens :]):
        basis = torch.cat([affine[n : n + 1], tokens.shifts]).T
        fit = torch.linalg.lstsq(basis, token[:, None]).solution
        torch.testing.assert_close((basis @ fit)[:, 0], token)
        assert fit[0] > 0


@pytest.mark.parametrize("options", LAYOUTS)
def test_every_token_layout_in_float64(options: dict) -> None:
    base, image = _case(options), smooth_images(1, 16)
    gradients = exact_gradients(base, image, torch.tensor([3]))[0]
    assert psnr(invert_attention_rowspace(base, gradients).images, image) >= 80


def test_embedded_base_in_float32_without_a_collapse() -> None:
    base, images = load_base("embedded"), smooth_images(8, 32)
    images[4:, :, :10] = 0  # equal patches, as borders have
    for image, gradients in zip(images, exact_gradients(base, images, torch.arange(8)), strict=True):
        found = invert_attention_rowspace(base, gradients)
        assert psnr(found.images, image[None]) >= 45
        assert found.details["rank"] == 64


def test_noise_is_met_by_the_prior_not_amplified() -> None:
    base, image = load_base("embedded"), smooth_images(1, 32)
    gradients = exact_gradients(base, image, torch.tensor([3]))[0]
    gray = psnr(torch.full_like(image, 0.5), image)
    exact = invert_attention_rowspace(base, gradients)
    rounded = invert_attention_rowspace(base, {QKV_WEIGHT: gradients[QKV_WEIGHT].bfloat16()})
    assert psnr(rounded.images, image) > gray - 0.5
    assert rounded.details["expected_error"] > 100 * exact.details["expected_error"]


def test_damaged_gradients_are_refused() -> None:
    base = small_vit()
    shape = base.model.blocks[0].attn.qkv.weight.shape
    for gradients, message in [
        ({}, "missing"),
        ({QKV_WEIGHT: torch.zeros(shape)}, "all zero"),
        ({QKV_WEIGHT: torch.full(shape, float("inf"))}, "NaN or infinity"),
        ({QKV_WEIGHT: torch.ones(3, 3)}, "shape"),
    ]:
        with pytest.raises(R2FError, match=message):
            invert_attention_rowspace(base, gradients)


def test_refused_by_count() -> None:
    base = small_vit(embed_dim=64)
    gradients = exact_gradients(base, smooth_images(1, 16), torch.tensor([3]))[0]
    with pytest.raises(R2FError, match="49 unknowns a patch against 47 equations"):
        invert_attention_rowspace(base, gradients)


def test_directions_weigh_signal_down_and_noise_fully() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(5, 20, dtype=torch.float64)
    rows = torch.randn(60, 4, dtype=torch.float64) @ tokens[1:] + 1e-6 * torch.randn(60, 20, dtype=torch.float64)
    found = weighted_directions(rows, tokens[:1], 4, 1e-12)
    size = found.weighted.norm(dim=1)
    assert (size[:4] < 1e-5).all() and (size[4:] > 0.5).all()
    torch.testing.assert_close(found.weighted @ tokens[0], torch.zeros(19, dtype=torch.float64))
    assert (found.weighted[4:] @ tokens.mT).abs().max() < 1e-5
    # 1e-6 times about sqrt(60): the size of a singular value of the noise.
    assert 0.5 < found.floor / (1e-6 * 60**0.5) < 1.5


def test_directions_that_no_row_reaches_count_as_orthogonal() -> None:
    rows = torch.randn(3, 10, dtype=torch.float64)
    found = weighted_directions(rows, rows[:0], 5, 1e-7)
    assert found.weighted.shape == (10, 10) and len(found.singular) == 3
    torch.testing.assert_close(found.weighted[3:].mT @ found.weighted[3:], complement(rows) @ complement(rows).mT)


def test_noise_as_large_as_the_gradient_leaves_the_mean_of_the_public_images() -> None:
    base, public = load_base("embedded"), smooth_images(40, 32)
    image = smooth_images(41, 32)[40:]
    weight = exact_gradients(base, image, torch.tensor([3]))[0][QKV_WEIGHT]
    mean = psnr(public.mean(0, keepdim=True), image)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for relative in (1e-6, 1e-3, 1.0):
        noisy = weight + relative * noise * weight.norm() / noise.norm()
        found.append(psnr(invert_attention_rowspace(base, {QKV_WEIGHT: noisy}, public).images, image))
    assert found[0] > found[1] + 10 and found[1] > mean and found[2] > mean - 0.5


def test_two_images_leave_as_many_directions_free_as_there_are_patches() -> None:
    """Why a batch of two is refused: differences of two images solve the equations of every position."""
    base, images = small_vit(embed_dim=128), smooth_images(2, 16)
    seen: list[torch.Tensor] = []
    handle = base.model.blocks[0].attn.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    base.model(base.normalize(images.double()))
    handle.remove()
    map_ = token_map(base, base_geometry(base))
    free = complement(seen[0].flatten(0, 1)[1:]).mT
    system = torch.cat([free @ map_.linear, free @ map_.shifts.T], dim=1)
    singular = torch.linalg.svdvals(system)
    assert system.shape[1] == 49 and (singular > 1e-9 * singular[0]).sum() == 49 - 16

import pytest
import torch
from timm.layers import RmsNorm
from vit_cases import psnr, small_vit, smooth_images

from r2f_ext.errors import R2FError
from r2f_ext.inversion.attention_rowspace import QKV_WEIGHT, invert_attention_rowspace, token_map
from r2f_ext.inversion.identifiability import vit_geometry
from r2f_ext.inversion.patches import unfold_patches
from r2f_ext.inversion.phase0 import exact_gradients
from r2f_ext.models.base import load_base

LAYOUTS = [
    {},
    {"class_token": False, "global_pool": "avg"},
    {"reg_tokens": 4, "no_embed_class": True, "dynamic_img_size": True},
    {"reg_tokens": 2},
    {"pre_norm": True},
    {"norm_layer": RmsNorm},
]


@pytest.mark.parametrize("options", LAYOUTS)
def test_token_map_describes_the_inputs_of_qkv(options: dict) -> None:
    base = small_vit(**options)
    geometry = vit_geometry(base.model)
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
    base, image = small_vit(**options), smooth_images(1, 16)
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

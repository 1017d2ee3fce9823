"""The geometry that counting and the closed forms read off a model."""

import pytest
import timm
from vit_cases import small_vit

from r2f_ext.errors import R2FError
from r2f_ext.inversion.geometry import vit_geometry
from r2f_ext.models.embedded import build_embedded_vit


def test_geometry_of_the_embedded_base() -> None:
    geometry = vit_geometry(build_embedded_vit())
    assert geometry.patch == (4, 4) and geometry.grid == (8, 8)
    assert (geometry.patch_tokens, geometry.prefix_tokens, geometry.tokens, geometry.width) == (64, 1, 65, 128)
    assert geometry.has_pos_embed and geometry.linear_qkv
    assert geometry.patch_numbers == 48 and geometry.norm_scales == 1


def test_geometry_knows_registers_and_pre_norm() -> None:
    geometry = vit_geometry(small_vit(reg_tokens=4, no_embed_class=True, pre_norm=True).model)
    assert geometry.prefix_tokens == 5 and geometry.norm_scales == 2


def test_a_resnet_has_none() -> None:
    with pytest.raises(R2FError, match="VisionTransformer"):
        vit_geometry(timm.create_model("resnet10t", num_classes=10))

"""Tokens counted by a forward pass, against what each architecture is known to make of an image."""

import pytest
import timm
import torch
from cases import tiny_base
from transformers_cases import classifier, dinov3

from r2f_ext.capture.tokens import tokens_of
from r2f_ext.inversion.geometry import base_geometry
from r2f_ext.models import load_base
from r2f_ext.models.timm_base import describe

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}


def test_a_vision_transformer_has_its_geometrys(embedded):
    for base in (embedded, tiny_base()):
        before = torch.random.get_rng_state()
        assert tokens_of(base) == base_geometry(base).tokens
        assert torch.equal(torch.random.get_rng_state(), before)
        assert not any(module._forward_pre_hooks for module in base.model.modules())


@pytest.mark.parametrize(
    ("name", "options", "tokens"),
    [
        ("vit_tiny_patch16_224", {**VIT, "reg_tokens": 3}, 16 + 1 + 3),
        ("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}, 16),
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1, 1, 1), "window_size": 7}, 14 * 14),
        ("resnet18", {}, 1),
    ],
    ids=str,
)
def test_other_architectures_of_timm(name, options, tokens):
    assert tokens_of(describe(timm.create_model(name, num_classes=3, **options).eval(), name)) == tokens


@pytest.mark.parametrize(
    ("make", "tokens"), [(lambda: classifier("vit"), 17), (lambda: classifier("siglip"), 16), (dinov3, 19)]
)
def test_architectures_of_transformers(make, tokens, tmp_path):
    make().save_pretrained(tmp_path)
    assert tokens_of(load_base(str(tmp_path))) == tokens

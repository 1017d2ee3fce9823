"""Bases from a folder, from timm by name, and everything that can be wrong with them."""

import copy
import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import use_fused_attn

from r2f_ext.errors import R2FError
from r2f_ext.models import load_base, save_base
from r2f_ext.models.base import _describe, unfuse_attention

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as save_base writes it, and the model that went in."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY).eval()
    folder = tmp_path_factory.mktemp("base") / "saved"
    base = _describe(model, "x")
    save_base(base, folder, "vit_tiny_patch16_224", TINY)
    return folder, base


def test_a_saved_base_comes_back(saved):
    folder, base = saved
    read = load_base(str(folder))
    images = torch.rand(2, 3, 32, 32)
    unfused = copy.deepcopy(base.model)
    unfuse_attention(unfused)  # the fused and the plain product round differently
    with torch.no_grad():
        assert torch.equal(read.model(read.normalize(images)), unfused(base.normalize(images)))
    assert read.input_shape == (3, 32, 32) and read.num_classes == 7 and read.spec == str(folder)
    assert not read.model.training and not any(p.requires_grad for p in read.model.parameters())


def test_pixel_statistics_of_the_folder_win(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    (folder / "config.json").write_text(json.dumps(config))
    base = load_base(str(folder))
    pixels = torch.rand(4, 3, 32, 32)
    expected = (pixels - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    torch.testing.assert_close(base.normalize(pixels), expected)
    torch.testing.assert_close(base.denormalize(base.normalize(pixels)), pixels)


def test_timm_by_name(monkeypatch):
    """timm's own create_model, with random weights in place of a download."""
    create, asked = timm.create_model, []

    def offline(name, pretrained, **options):
        asked.append(pretrained)
        return create(name, pretrained=False, **options, **TINY)

    monkeypatch.setattr(timm, "create_model", offline)
    base = load_base("timm:vit_tiny_patch16_224", num_classes=4)
    assert asked == [True] and base.num_classes == 4 and base.model.head.out_features == 4
    assert base.mean == tuple(base.model.pretrained_cfg["mean"])


def test_double_backward_works(saved):
    """Matching differentiates through the backward: fused attention would refuse."""
    base = load_base(str(saved[0]))
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    (first,) = torch.autograd.grad(base.model(images).square().sum(), images, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), images)
    assert torch.isfinite(second).all() and second.any()


def test_timms_global_flag_is_left_alone(saved):
    before = use_fused_attn()
    model = load_base(str(saved[0])).model
    flags = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    assert flags and not any(flags)
    assert use_fused_attn() == before
    assert timm.create_model("vit_tiny_patch16_224", **TINY).blocks[0].attn.fused_attn == bool(before)


def damage(folder, what):
    config = json.loads((folder / "config.json").read_text())
    if what in ("config.json", "model.safetensors"):
        (folder / what).unlink()
    elif what == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    elif what == "other weights":
        tensors = load_file(folder / "model.safetensors")
        save_file({"other": tensors["cls_token"]}, folder / "model.safetensors")
    elif isinstance(what, str):
        (folder / "config.json").write_text(what)
    else:
        (folder / "config.json").write_text(json.dumps(config | what))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no model.safetensors"),
        ("truncated", "does not fit"),
        ("other weights", "does not fit"),
        ("{", "not a timm config"),
        ("[]", "not a timm config"),
        ("{}", "not a timm config"),
        ({"architecture": "vit_nothing"}, "timm does not have"),
        ({"architecture": 5}, "timm does not have"),
        ({"num_classes": "x"}, "does not fit"),
        ({"num_classes": 9}, "does not fit"),
        ({"model_args": 5}, "does not fit"),
        ({"model_args": {"embed_dim": 15}}, "does not fit"),
        ({"model_args": {"img_size": 0}}, "does not fit"),
        ({"pretrained_cfg": 5}, "damaged pretrained_cfg"),
        ({"pretrained_cfg": {"mean": 5}}, "damaged pretrained_cfg"),
    ],
)
def test_damaged_folder(saved, tmp_path, what, words):
    folder = shutil.copytree(saved[0], tmp_path / "base")
    damage(folder, what)
    with pytest.raises(R2FError, match=words) as caught:
        load_base(str(folder))
    assert "\n" not in str(caught.value)


def test_unknown_names(monkeypatch):
    with pytest.raises(R2FError, match=r"unknown base model 'vit_huge_nothing'.*close: .*vit"):
        load_base("timm:vit_huge_nothing")
    with pytest.raises(R2FError, match="use 'embedded', 'timm:NAME', or a folder"):
        load_base("no-such-folder")

    def offline(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(R2FError, match=r"could not be loaded \(ConnectionError\)"):
        load_base("timm:vit_tiny_patch16_224")

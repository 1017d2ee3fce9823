"""Bases of timm: folders as the installed timm and older forms write them, names, random weights; and what is wrong."""

import copy
import json
import shutil
import time

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.layers import use_fused_attn
from timm.models import save_for_hf

from r2f_ext.errors import R2FError
from r2f_ext.models import hub, load_base, save_base
from r2f_ext.models.timm_base import describe, safetensors_name, unfuse_attention

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as save_base writes it, and the model that went in."""
    model = timm.create_model(NAME, num_classes=7, **TINY).eval()
    folder = tmp_path_factory.mktemp("base") / "saved"
    base = describe(model, "x")
    save_base(base, folder, NAME, TINY)
    return folder, base


def same_logits(folder, model, channels=3, size=32):
    """Whether the folder's base is the model, up to rounding: weights at other addresses may be added up otherwise."""
    base, inputs = load_base(str(folder)), torch.randn(2, channels, size, size)
    own = copy.deepcopy(model).eval()
    unfuse_attention(own)
    with torch.no_grad():
        return torch.allclose(base.model(inputs), own(inputs), rtol=1e-4, atol=1e-5)


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_a_saved_base_comes_back(saved):
    folder, base = saved
    read = load_base(str(folder))
    assert same_logits(folder, base.model)
    assert read.input_shape == (3, 32, 32) and read.num_classes == 7 and read.spec == str(folder)
    assert not read.model.training and not any(p.requires_grad for p in read.model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 3},
        {"num_classes": 3, **TINY},
        {"in_chans": 1, **TINY},
        {"num_classes": 0, **TINY},
        {"global_pool": "avg", **TINY},
        {"class_token": False, "global_pool": "avg", **TINY},
    ],
    ids=str,
)
def test_folders_of_the_installed_timm(options, tmp_path):
    """timm records what create_model got; nothing is passed by hand."""
    model = timm.create_model(NAME, pretrained=False, **({"depth": 1} | options))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    base = load_base(str(tmp_path))
    size, channels = options.get("img_size", 224), options.get("in_chans", 3)
    assert base.input_shape == (channels, size, size) and base.num_classes == model.num_classes
    assert len(base.mean) == len(base.std) == channels and base.notes == ()
    assert same_logits(tmp_path, model, channels, size)


def test_folders_of_older_timm(tmp_path):
    """Without model_args, for a model of the architecture's own size; and with all fields at one level."""
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    edit_config(tmp_path, lambda config: config.pop("model_args"))
    assert same_logits(tmp_path, model, size=224) and load_base(str(tmp_path)).num_classes == 3
    config = json.loads((tmp_path / "config.json").read_text())
    flat = config["pretrained_cfg"] | {"architecture": NAME, "num_classes": 3}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert same_logits(tmp_path, model, size=224)


def test_an_older_pretrained_cfg_yields_to_model_args(tmp_path):
    """As in timm itself: model_args describe the weights, and 1 channel against a pretrained_cfg of 3 is common."""
    model = timm.create_model(NAME, pretrained=False, in_chans=1, **TINY)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    statistics = {"input_size": [3, 224, 224], "mean": [0.1, 0.2, 0.6], "std": [0.2, 0.2, 0.5]}
    edit_config(tmp_path, lambda config: config["pretrained_cfg"].update(statistics))
    base = load_base(str(tmp_path))
    assert base.input_shape == (1, 32, 32) and same_logits(tmp_path, model, 1)
    assert base.mean == pytest.approx((0.3,)) and base.std == pytest.approx((0.3,))
    assert base.notes == ("pretrained_cfg gives 3 pixel means for 1 channels: their average is used for each.",)


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ({}, {"num_classes": 9}, r"says num_classes=9 and, in model_args, 1000"),
        (TINY, {"model_args": None}, r"is \[.*\] in the file and \[.*\] in the model; save both with timm.*safe_seri"),
        ({"in_chans": 1}, {"model_args": None, "input_size": [3, 224, 224]}, r"patch_embed.proj.weight is .192, 1, 16"),
        ({}, {"model_args": None, "input_size": [3, 64, 64]}, "gives an input of 64x64, and the weights .* 224x224"),
        ({}, {"model_args": None, "input_size": [1, 224, 224]}, r"patch_embed.proj.weight is"),
        (
            {"num_classes": 3},
            {"model_args": None, "num_classes": 5},
            r"head.weight is .3, 192. in the file and .5, 192",
        ),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_of_the_weights_is_refused(options, change, words, tmp_path):
    model = timm.create_model(NAME, pretrained=False, **options)
    save_for_hf(model, str(tmp_path), safe_serialization=True)

    def edit(config):
        for name, value in change.items():
            if name == "input_size":
                config["pretrained_cfg"] |= {"input_size": value, "fixed_input_size": False}
            elif value is None:
                del config[name]
            else:
                config[name] = value

    edit_config(tmp_path, edit)
    with pytest.raises(R2FError, match=words) as caught:
        load_base(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_pickle_that_timm_writes_by_default_is_named_with_the_remedy(tmp_path):
    save_for_hf(timm.create_model(NAME, pretrained=False, **TINY), str(tmp_path))
    with pytest.raises(R2FError, match=r"pytorch_model.bin, a pickle, which is never opened: save it with") as caught:
        load_base(str(tmp_path))
    assert "save_for_hf(model, folder, safe_serialization=True)" in str(caught.value)


def test_an_adapter_with_its_own_head(saved, tmp_path):
    base = load_base(str(saved[0]), num_classes=4)
    assert base.num_classes == 4 and base.model.head.out_features == 4
    model = timm.create_model(NAME, pretrained=False, num_classes=0, **TINY)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert load_base(str(tmp_path)).num_classes == 0
    assert load_base(str(tmp_path), num_classes=4).model(torch.rand(1, 3, 32, 32)).shape == (1, 4)


def test_pixel_statistics_of_the_folder_win(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "base")
    statistics = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    edit_config(folder, lambda config: config["pretrained_cfg"].update(statistics))
    base = load_base(str(folder))
    pixels = torch.rand(4, 3, 32, 32)
    expected = (pixels - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    torch.testing.assert_close(base.normalize(pixels), expected)
    torch.testing.assert_close(base.denormalize(base.normalize(pixels)), pixels)


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
    assert timm.create_model(NAME, **TINY).blocks[0].attn.fused_attn == bool(before)


def test_random_weights_follow_the_seed():
    bases = [load_base(f"timm-random:{NAME}{seed}") for seed in ("", ":0", ":1")]
    weights = [base.model.blocks[0].attn.qkv.weight for base in bases]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert [f"(seed {seed})" in base.notes[0] for base, seed in zip(bases, (0, 0, 1), strict=True)] == [True] * 3
    assert "random weights" in bases[0].notes[0]
    assert load_base(f"timm-random:{NAME}", num_classes=3).num_classes == 3


# --- by name: the local cache first, and one sentence at once where there is no network


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, and a network that fails if it is asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def asked(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(hub, "get_session", asked)
    return tmp_path


def put(cache, repo, files):
    """Files of one model repository as the hub's client caches them."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    for name, path in files.items():
        shutil.copy(path, snapshot / name)


def test_by_name_from_the_cache(cache, tmp_path):
    model = timm.create_model(NAME, pretrained=False)
    save_file(model.state_dict(), tmp_path / "weights")
    put(cache, timm.get_pretrained_cfg(NAME).hf_hub_id, {"model.safetensors": tmp_path / "weights"})
    base = load_base(f"timm:{NAME}")
    assert torch.equal(base.model.head.weight, model.head.weight) and base.notes == ()
    assert base.mean == tuple(model.pretrained_cfg["mean"]) and base.spec == f"timm:{NAME}"
    other = load_base(f"timm:{NAME}", num_classes=4)
    assert other.num_classes == 4 and torch.equal(other.model.pos_embed, model.pos_embed)


@pytest.mark.parametrize("spec", [f"timm:{NAME}", "transformers:google/vit-base-patch16-224-in21k"])
def test_a_name_that_is_not_cached_is_one_sentence_at_once(spec, cache, monkeypatch):
    began = time.perf_counter()
    with pytest.raises(R2FError, match="are not in the local cache, and the hub does not answer") as caught:
        load_base(spec)
    assert "pass that folder as --base" in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(R2FError, match="HF_HUB_OFFLINE is set") as caught:
        load_base(spec)
    assert "pass that folder as --base" in str(caught.value) and time.perf_counter() - began < 5


def test_transformers_by_name_from_the_cache(cache, tmp_path):
    from transformers_cases import classifier  # only this test needs transformers

    model = classifier("vit")
    model.save_pretrained(tmp_path / "saved")
    put(cache, "someone/small-vit", {path.name: path for path in (tmp_path / "saved").iterdir()})
    base = load_base("transformers:someone/small-vit")
    assert torch.equal(base.model.classifier.weight, model.classifier.weight) and base.num_classes == 5


@pytest.mark.parametrize(
    ("filename", "twin"),
    [
        (None, "model.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("other.bin", "other.safetensors"),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_only_safetensors_are_asked_for(filename, twin):
    assert safetensors_name(filename) == twin


def damage(folder, what):
    if what in ("config.json", "model.safetensors"):
        (folder / what).unlink()
    elif what == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    elif what == "other weights":
        tensors = load_file(folder / "model.safetensors")
        save_file({"other": tensors["cls_token"]}, folder / "model.safetensors")
    elif what == "more weights":
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {"other": tensors["cls_token"].clone()}, folder / "model.safetensors")
    else:
        edit_config(folder, lambda config: config.update(what))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no model.safetensors: save it with timm.models.save_for_hf"),
        ("truncated", "truncated or not a safetensors file"),
        ("other weights", "does not fit .*: the file has no cls_token"),
        ("more weights", "does not fit .*: the model has no other"),
        ({"architecture": "vit_nothing"}, "timm does not have"),
        ({"architecture": 5}, "timm does not have"),
        ({"num_classes": "x"}, "does not describe a"),
        ({"num_classes": 9}, r"head.weight is \[7, 16\] in the file and \[9, 16\] in the model"),
        ({"model_args": 5}, "damaged pretrained_cfg or model_args"),
        ({"model_args": {"embed_dim": 15}}, "does not (describe|fit)"),
        ({"model_args": {"img_size": 0}}, "does not (describe|fit)"),
        ({"model_args": {"pretrained_cfg": {}}}, "does not describe a"),
        ({"model_args": {"nonsense": 1}}, "does not describe a"),
        ({"pretrained_cfg": 5}, "damaged pretrained_cfg"),
        ({"pretrained_cfg": {"mean": 5}}, "damaged pretrained_cfg"),
        ({"pretrained_cfg": {"mean": ["a", "b", "c"]}}, "damaged pretrained_cfg"),
        ({"pretrained_cfg": {"input_size": 5}}, "does not describe a"),
    ],
    ids=str,
)
def test_damaged_folder(saved, tmp_path, what, words):
    folder = shutil.copytree(saved[0], tmp_path / "base")
    damage(folder, what)
    with pytest.raises(R2FError, match=words) as caught:
        load_base(str(folder))
    assert "\n" not in str(caught.value)

"""How `load_base` tells the kinds of bases apart, and its sentences for what is none of them."""

import json

import pytest
import torch
from transformers_cases import classifier

from r2f_ext.errors import R2FError
from r2f_ext.models import load_base
from r2f_ext.models.base import check_classifier
from r2f_ext.types import BaseModel


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no-such-folder", r"use 'embedded', 'timm:NAME', 'timm-random:NAME', 'transformers:OWNER/NAME', or a folder"),
        ("google/vit-base-patch16-224-in21k", r"is named transformers:google/vit-base-patch16-224-in21k"),
        ("timm:vit_huge_nothing", r"unknown base model 'vit_huge_nothing'.*close ones are .*vit"),
        ("timm-random:vit_huge_nothing", r"unknown base model 'vit_huge_nothing'"),
        ("timm-random:vit_tiny_patch16_224:x", "'x' in .* is not a seed"),
        ("timm-random:vit_tiny_patch16_224:-1", "'-1' in .* is not a seed"),
    ],
)
def test_what_is_no_base(spec, words):
    with pytest.raises(R2FError, match=words) as caught:
        load_base(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no config.json"),
        ({"adapter_config.json": "{}"}, "holds an adapter: pass the model that it was trained on"),
        ({"config.json": "{"}, "is not readable JSON"),
        ({"config.json": b"\xff\xfe\x00"}, "is not readable JSON"),
        ({"config.json": "[" * 100_000}, "is not readable JSON"),
        ({"config.json": "[]"}, "names neither an 'architecture' .timm. nor a 'model_type' .transformers."),
        ({"config.json": "{}"}, "names neither"),
        ({"config.json": "5"}, "names neither"),
    ],
)
def test_folders_that_are_no_base(files, words, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(R2FError, match=words):
        load_base(str(tmp_path))


@pytest.mark.parametrize("kind", ["architecture", "model_type"])
def test_values_that_nest_nearly_too_deeply_are_refused_in_a_sentence(kind, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    name = {"architecture": "vit_tiny_patch16_224", "model_type": "vit"}[kind]
    for depth in range(500, 1000, 25):
        nested = f"{'[' * depth}{']' * depth}"
        config = f'{{"{kind}": "{name}", "num_classes": {nested}, "hidden_size": {nested}, "pretrained_cfg": {{}}}}'
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(R2FError) as caught:
            load_base(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_a_file_is_not_a_folder(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(R2FError, match="It is a file: pass the folder that holds it"):
        load_base(str(path))


def test_the_configuration_decides_whose_folder_it_is(tmp_path):
    classifier("vit").save_pretrained(tmp_path)
    assert type(load_base(str(tmp_path)).model).__name__ == "ViTForImageClassification"
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "vit_tiny_patch16_224"}))
    with pytest.raises(R2FError, match="does not fit the model that"):  # read as timm's now
        load_base(str(tmp_path))


def test_loading_draws_from_no_shared_stream():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_base("timm-random:vit_tiny_patch16_224:7", num_classes=2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("classes", "words"), [(0, "has no classifier"), (1, "has one class")])
def test_cross_entropy_needs_two_classes(classes, words):
    base = BaseModel(torch.nn.Identity(), "x", (3, 8, 8), (0.0,) * 3, (1.0,) * 3, classes)
    with pytest.raises(R2FError, match=words):
        check_classifier(base)

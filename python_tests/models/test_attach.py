"""PEFT folders bound to their base, compared with PEFT's own model."""

import copy

import pytest
import torch
from cases import CONV, changed_config, changed_weights, peft_factors, peft_model, save, train
from torch import nn

from r2f_ext.errors import R2FError
from r2f_ext.models import attach, load_adapter, read_adapter
from r2f_ext.types import BaseModel

BLOCKS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
CASES = {
    "default": {"target_modules": BLOCKS},
    "rank 4, alpha 32": {"r": 4, "lora_alpha": 32, "target_modules": ["mlp.fc1"]},
    "one layer by its path": {"target_modules": ["blocks.2.attn.proj"]},
    "patterns": {
        "target_modules": BLOCKS,
        "rank_pattern": {"attn.qkv": 4, "blocks.1.mlp.fc1": 2},
        "alpha_pattern": {"attn.qkv": 3},
    },
    "rsLoRA": {"use_rslora": True, "target_modules": ["attn.qkv", "mlp.fc2"]},
    "saved head": {"modules_to_save": ["head"]},
    "patch embedding": {"target_modules": [CONV, "attn.qkv"]},
    "some blocks": {"layers_to_transform": [1, 3], "layers_pattern": "blocks"},
    "regular expression": {"target_modules": r"blocks\.[01]\.mlp\.fc\d"},
    "gaussian start": {"init_lora_weights": "gaussian"},
}


def merged(target, update) -> nn.Module:
    """The target's base with W + s B A written into its weights, and whole saved parameters as training left them."""
    model = copy.deepcopy(target.base.model)
    for name, moved in update.gradients.items():
        model.get_parameter(name).sub_(moved)
    for layer in target.without_saved().layers:
        weight = model.get_submodule(layer.name).weight
        weight += (layer.scale * update.b[layer.name] @ update.a[layer.name]).view_as(weight)
    return model


@pytest.mark.parametrize("lora", CASES.values(), ids=CASES.keys())
def test_what_peft_saved_is_what_is_read(lora, tmp_path, embedded, private):
    model = peft_model(embedded, **lora)
    train(model, embedded, private.batch(slice(None)), private.labels, steps=2)
    target, update = attach(read_adapter(save(model, tmp_path / "a")), embedded)
    wrapped = [name for name, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert list(target.without_saved().names) == wrapped and wrapped
    for layer in target.without_saved().layers:
        a, b, scale = peft_factors(model, layer.name)
        assert (layer.d_out, layer.rank, layer.d_in) == (b.shape[0], a.shape[0], a.shape[1])
        assert layer.scale == pytest.approx(scale, rel=1e-12)
        assert torch.equal(update.a[layer.name], a) and torch.equal(update.b[layer.name], b)
    inputs = embedded.normalize(private.batch(slice(None)))
    with torch.no_grad():
        expected, before = model.eval()(inputs), embedded.model(inputs)
        torch.testing.assert_close(merged(target, update)(inputs), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, expected, atol=1e-4)
        assert torch.equal(embedded.model(inputs), before)  # the base itself is left alone


def test_a_saved_head_of_unknown_start_replaces_the_base_head_only_in_the_target(tmp_path, embedded, private):
    model = peft_model(embedded, modules_to_save=["head"])
    with torch.no_grad():
        nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    train(model, embedded, private.batch(slice(None)), private.labels)
    files = read_adapter(save(model, tmp_path / "a"))
    before = embedded.model.head.weight.clone()
    target, _ = attach(files, embedded)
    assert files.num_classes == 10
    trained = model.base_model.model.head.modules_to_save["default"].weight
    assert torch.equal(target.base.model.head.weight, trained) and not torch.equal(before, trained)
    assert torch.equal(embedded.model.head.weight, before)
    assert not any(p.requires_grad for p in target.base.model.parameters())


def test_half_precision_becomes_float32_and_double_stays(tmp_path, adapter_folder, embedded):
    half = changed_weights(adapter_folder, tmp_path / "half", lambda w: {k: v.bfloat16() for k, v in w.items()})
    double = changed_weights(adapter_folder, tmp_path / "double", lambda w: {k: v.double() for k, v in w.items()})
    kinds = [{a.dtype for a in attach(read_adapter(f), embedded)[1].a.values()} for f in (half, double)]
    assert kinds == [{torch.float32}, {torch.float64}]


def test_attach_leaves_the_files_as_they_were(adapter_folder, embedded):
    files = read_adapter(adapter_folder)
    names = list(files.weights)
    first, second = attach(files, embedded), attach(files, embedded)
    assert list(files.weights) == names
    assert all(torch.equal(a, second[1].a[name]) for name, a in first[1].a.items())


def test_load_adapter_reads_and_attaches(adapter_folder, embedded):
    target, update = load_adapter(adapter_folder, embedded)
    expected, factors = attach(read_adapter(adapter_folder), embedded)
    assert target.layers == expected.layers
    for name in target.names:
        assert torch.equal(update.a[name], factors.a[name]) and torch.equal(update.b[name], factors.b[name])


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0},
        {"r": "eight"},
        {"lora_alpha": "x"},
        {"target_modules": 5},
        {"target_modules": "("},
        {"target_modules": []},
        {"target_modules": ["norm1"]},
        {"rank_pattern": [1]},
        {"rank_pattern": {"attn.qkv": "four"}},
        {"layers_to_transform": ["a"]},
    ],
)
def test_a_damaged_config_is_one_error(fields, tmp_path, adapter_folder, embedded):
    folder = changed_config(adapter_folder, tmp_path / "a", **fields)
    with pytest.raises(R2FError) as caught:
        attach(read_adapter(folder), embedded)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_convolutions_that_do_not_cut_patches_are_refused(tmp_path):
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 4, 3, padding=1))
    base = BaseModel(model, "conv", (3, 8, 8), (0.0,) * 3, (1.0,) * 3, 4)
    peft = peft_model(base, target_modules=["stem"])
    with torch.no_grad():
        peft.base_model.model.stem.lora_B["default"].weight.fill_(1)
    files = read_adapter(save(peft, tmp_path / "a"))
    with pytest.raises(R2FError, match="stem is a Conv2d"):
        attach(files, base)

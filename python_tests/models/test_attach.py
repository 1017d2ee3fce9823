"""PEFT folders bound to their base: PEFT's own model and its weight changes are the truth, over families of bases."""

import copy
import json

import pytest
import timm
import torch
from cases import CONFIG, CONV, changed_config, changed_weights, peft_factors, peft_model, save, train
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers_cases import FAMILIES, PATCHES, classifier

from r2f_ext.errors import R2FError
from r2f_ext.models import attach, load_adapter, load_base, note_on_base, read_adapter
from r2f_ext.models.timm_base import describe
from r2f_ext.types import BaseModel

BLOCKS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
EMBEDDED_LORAS = {
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


@pytest.mark.parametrize("lora", EMBEDDED_LORAS.values(), ids=EMBEDDED_LORAS.keys())
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


# --- configurations and families of bases: every weight change is PEFT's

ALPHA = {"r": 4, "lora_alpha": 12}
VARIANTS = {
    "plain": {},
    "rank and alpha by pattern": {"rank_pattern": {"QUERY": 2, "^BLOCK.1.*VALUE$": 3}, "alpha_pattern": {"VALUE": 5}},
    "anchored alpha": {"alpha_pattern": {"^QUERY": 100, "^.*VALUE": 7}},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA by pattern": {"use_rslora": True, "rank_pattern": {"VALUE": 2}, "alpha_pattern": {"QUERY": 3}},
    "some blocks": {"layers_to_transform": [1], "layers_pattern": "LAYERS"},
    "excluded": {"exclude_modules": ["VALUE"]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "a regular expression": {"target_modules": r".*\.1\..*(QUERY|VALUE)"},
    "every linear layer": {"target_modules": "all-linear"},
    "patches": {"target_modules": ["PATCH", "QUERY"]},
}
NAMES = {family: ("q_proj", "v_proj", "layers", PATCHES.get(family, "projection")) for family in FAMILIES} | {
    "dinov2": ("q_proj", "v_proj", "layer", "projection"),
    "timm": ("attn.qkv", "mlp.fc1", "blocks", "patch_embed.proj"),
    "timm eva": ("attn.q_proj", "attn.v_proj", "blocks", "patch_embed.proj"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, BaseModel]:
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        classifier(family).save_pretrained(folder)
        found[family] = load_base(str(folder))
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    found["timm"] = BaseModel(model.eval().requires_grad_(False), "timm", (3, 16, 16), (0.5,) * 3, (0.5,) * 3, 5)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    eva = timm.create_model("eva02_tiny_patch14_224", qkv_fused=False, **small)  # three layers for q, k and v
    found["timm eva"] = describe(eva.eval().requires_grad_(False), "eva")
    return found


def options_of(variant: str, family: str) -> dict:
    """A variant's options with the family's own names."""
    query, value, layers, patch = NAMES[family]
    text = json.dumps({"target_modules": [query, value], **VARIANTS[variant]})
    for word, name in (("QUERY", query), ("VALUE", value), ("LAYERS", layers), ("PATCH", patch), ("BLOCK", ".*")):
        text = text.replace(word, name)
    return ALPHA | json.loads(text)


def trained(base: BaseModel, **options) -> nn.Module:
    """A PEFT model of `base` with random factors, as after any training."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base.model), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_change_is_pefts(variant, family, bases, tmp_path):
    model = trained(bases[family], **options_of(variant, family))
    target, update = attach(read_adapter(save(model, tmp_path / "a")), bases[family])
    placed = {name: each for name, each in model.base_model.model.named_modules() if isinstance(each, LoraLayer)}
    assert list(target.names) == list(placed) and placed
    for layer in target.layers:
        found = layer.scale * update.b[layer.name] @ update.a[layer.name]
        expected = placed[layer.name].get_delta_weight("default").flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "rank and alpha by pattern", "some blocks", "a regular expression"])
def test_names_of_an_older_transformers(variant, bases, tmp_path):
    """The tutorial's adapters on the hub say query and value, which transformers 5 renamed."""

    def old(name):
        name = name.replace("vit.layers.", "vit.encoder.layer.").replace("layers", "layer")
        return name.replace("attention.q_proj", "attention.attention.query").replace(
            "attention.v_proj", "attention.attention.value"
        )

    model = trained(bases["vit"], **options_of(variant, "vit"))
    folder = save(model, tmp_path / "a")
    text = (folder / CONFIG).read_text().replace("q_proj", "query").replace("v_proj", "value")
    fields = json.loads(text.replace('"layers"', '"layer"'))
    renamed = changed_weights(folder, tmp_path / "old", lambda w: {old(name): value for name, value in w.items()})
    (renamed / CONFIG).write_text(json.dumps(fields))
    target, update = attach(read_adapter(renamed), bases["vit"])
    expected, factors = attach(read_adapter(folder), bases["vit"])
    assert target.layers == expected.layers
    assert all(torch.equal(update.b[name], factors.b[name]) for name in target.names)
    assert any("an older transformers" in note for note in target.base.notes)


# --- what does not fit: the sentence names the layer and the cause


@pytest.fixture
def timm_adapter(bases, tmp_path):
    return save(trained(bases["timm"], **options_of("plain", "timm")), tmp_path / "adapter")


def renamed(change):
    return lambda weights: {change(name): value for name, value in weights.items()}


MISFITS = {
    "another base": (
        renamed(lambda n: n.replace("mlp.fc1", "mlp.gate")),
        {},
        r"it changes blocks.0.mlp.gate, and the base has no such layer",
    ),
    "a wrapper": (
        renamed(lambda n: n.replace("blocks.", "backbone.blocks.")),
        {},
        r"changes backbone.blocks.0.attn.qkv, and the base has blocks.0.attn.qkv: .* holds this one as 'backbone'",
    ),
    "wider": (
        lambda w: {n: v.repeat(1, 2) if "lora_A" in n else v for n, v in w.items()},
        {},
        r"blocks.0.attn.qkv maps 48 to 72 numbers, and the base's maps 24 to 72",
    ),
    "half of B": (
        lambda w: {n: v[: len(v) // 2].clone() if "lora_B" in n else v for n, v in w.items()},
        {},
        r"B \[36, 4\] of blocks.0.attn.qkv.*a tensor was cut",
    ),
    "half of A": (
        lambda w: {n: v[: len(v) // 2].clone() if "lora_A" in n else v for n, v in w.items()},
        {},
        r"A of blocks.0.attn.qkv has 2 rows and B 4 columns",
    ),
    "a layer less": (
        lambda w: {n: v for n, v in w.items() if "blocks.1.mlp.fc1" not in n},
        {},
        r"holds no factors of blocks.1.mlp.fc1",
    ),
    "another rank": (
        lambda w: w,
        {"r": 8},
        r"A of blocks.0.attn.qkv has 4 rows, while adapter_config.json gives r = 8",
    ),
    "another target": (
        lambda w: w,
        {"target_modules": ["attn.qkv"]},
        r"holds factors of blocks.0.mlp.fc1, which its configuration does not adapt",
    ),
    "no target": (lambda w: w, {"target_modules": ["nothing"]}, r"configuration that PEFT cannot apply"),
}


@pytest.mark.parametrize(("change", "fields", "words"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_named(change, fields, words, timm_adapter, bases, tmp_path):
    other = changed_config(changed_weights(timm_adapter, tmp_path / "b", change), tmp_path / "c", **fields)
    with pytest.raises(R2FError, match=words) as caught:
        attach(read_adapter(other), bases["timm"])
    assert "\n" not in str(caught.value) and "name its own base" not in str(caught.value)


def test_an_adapter_of_transformers_on_a_base_of_timm(bases, tmp_path):
    folder = save(trained(bases["vit"], **options_of("plain", "vit")), tmp_path / "a")
    with pytest.raises(R2FError, match=r"it changes vit.layers.0.attention.q_proj, and the base has no such layer"):
        attach(read_adapter(folder), bases["timm"])


def test_a_base_without_a_classifier_needs_the_adapters(bases, tmp_path):
    bare = BaseModel(copy.deepcopy(bases["timm"].model), "bare", (3, 16, 16), (0.5,) * 3, (0.5,) * 3, 0)
    bare.model.reset_classifier(0)
    folder = save(trained(bare, **options_of("plain", "timm")), tmp_path / "a")
    with pytest.raises(R2FError, match=r"base 'bare' has no classifier, and no adapter brings one"):
        attach(read_adapter(folder), bare)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (None, "does not name its base: the figures hold if 'timm' holds the weights of its training"),
        ("google/vit-base-patch16-224", "names 'google/vit-base-patch16-224' as its base, and it is audited on 'timm'"),
        ("someone/timm", None),
        ("/home/someone/models/other", "names 'other' as its base"),
    ],
)
def test_what_the_name_of_the_base_says(said, words, timm_adapter, bases, tmp_path):
    other = changed_config(timm_adapter, tmp_path / "b", base_model_name_or_path=said)
    notes = note_on_base(read_adapter(other), bases["timm"])
    assert notes == () if words is None else len(notes) == 1 and words in notes[0]
    assert not any("/home" in note for note in notes)


@pytest.mark.parametrize("classes", [4, 7])
def test_the_adapters_own_head_on_a_base_without_one_or_with_another(classes, tmp_path):
    """As timm's users do it: a new head, trained and saved with the adapter."""
    bare = tmp_path / "bare"
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0 if classes == 4 else 3, **options)
    save_for_hf(model, str(bare), safe_serialization=True)
    trained_base = copy.deepcopy(model)
    trained_base.reset_classifier(classes)
    full = BaseModel(trained_base, "full", (3, 16, 16), (0.5,) * 3, (0.5,) * 3, classes)
    peft = trained(full, **options_of("plain", "timm"), modules_to_save=["head"])
    files = read_adapter(save(peft, tmp_path / "a"))
    assert files.num_classes == classes
    target, _ = attach(files, load_base(str(bare), num_classes=classes))
    inputs = torch.rand(2, 3, 16, 16)
    assert target.base.num_classes == classes and target.base.model(inputs).shape == (2, classes)
    saved = peft.base_model.model.head.modules_to_save["default"]
    assert torch.equal(target.base.model.head.weight, saved.weight)

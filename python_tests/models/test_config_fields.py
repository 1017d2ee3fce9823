"""adapter_config.json: every field used, harmless or refused by name, and every wrong type one sentence."""

import json
from dataclasses import fields

import pytest
from adapter_cases import CONFIG, config, write
from peft import LoraConfig

from r2f_ext.errors import R2FError
from r2f_ext.models import read_adapter
from r2f_ext.models.config_fields import HARMLESS_FIELDS, READ_FIELDS, USED_FIELDS, VARIANTS, read_config


@pytest.fixture
def read(tmp_path):
    def from_fields(**changed):
        path = tmp_path / CONFIG
        path.write_text(json.dumps(config(**changed)))
        return read_config(path)

    return from_fields


def refused(read, **changed) -> str:
    with pytest.raises(R2FError) as caught:
        read(**changed)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 900 and CONFIG in message
    return message


@pytest.mark.parametrize("field", [*VARIANTS, "a_field_of_a_later_peft"])
def test_every_variant_is_refused_by_name(field, read):
    message = refused(read, **{field: {"bias": "all"}.get(field, {"anything": 1})})
    assert field in message and VARIANTS.get(field, "not known here") in message


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_an_unknown_field_that_is_off_is_accepted(value, read):
    assert read(a_field_of_a_later_peft=value, use_dora=value).lora == read().lora


@pytest.mark.parametrize("value", [0, 0.0, True, 1, 0.25, "x", [0], {"a": None}])
def test_an_unknown_field_that_is_on_is_refused(value, read):
    assert "(output_scale)" in refused(read, output_scale=value)


def test_every_field_of_peft_at_its_default_is_accepted(adapter_folder, tmp_path):
    """What LoraConfig writes today; fields that are neither used, harmless nor named variants are refused when on."""
    plain = json.loads((adapter_folder / CONFIG).read_text())
    known = {*USED_FIELDS, *READ_FIELDS, *HARMLESS_FIELDS, *VARIANTS, "init_lora_weights"}
    assert read_adapter(adapter_folder).weights
    assert plain.keys() <= known and {field.name for field in fields(LoraConfig)} - known == set()


def test_harmless_fields_may_have_any_value(read):
    others = [name for name in HARMLESS_FIELDS if name != "peft_type"]
    for value in ("anything", 5, [1], {"a": 1}):
        assert read(**dict.fromkeys(others, value)).lora == read().lora


WRONG = {
    "r": [None, 0, -8, 8.0, "8", True, 10**9, 10**4000, [8], {}],
    "lora_alpha": [None, 0, 0.0, "16", True, [16], 1e300, 10**4000],
    "target_modules": [None, 5, True, {}, [], "", [1], ["a", None], ["x"] * 5000],
    "exclude_modules": [5, {}, [1], True],
    "layers_to_transform": ["all", 1.5, ["a"], [1.0], [True], {}, True],
    "layers_pattern": [5, [5], {}],
    "rank_pattern": [5, [1], {"a": "four"}, {"a": 0}, {"a": 1.5}, {"a": True}, {"a": None}, {"a": 10**9}],
    "alpha_pattern": [5, [1], {"a": "four"}, {"a": 0}, {"a": True}, {"a": None}],
    "use_rslora": [1, "true", [True]],
    "fan_in_fan_out": [0, "false", {}],
    "modules_to_save": [5, {}, [5], [None], True],
    "lora_dropout": ["anything", -0.1, 1, 1.5, True, [0.1]],
    "peft_type": [None, "IA3", 5, ["LORA"], "lora"],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_type_or_range_is_named(field, value, read):
    message = refused(read, **{field: value})
    assert field in message or (field == "peft_type" and "adapter: only plain LoRA" in message)


def test_the_sentences_name_value_and_remedy(read):
    assert 'has r = "eight": it must be a whole number from 1 to 65536.' in refused(read, r="eight")
    assert "has lora_alpha = 0: it must be a number other than 0" in refused(read, lora_alpha=0)
    assert "has peft_type IA3: only plain LoRA" in refused(read, peft_type="IA3")
    assert "does not say which modules it adapts" in refused(read, target_modules=[])
    assert "which is no regular expression (missing )" in refused(read, target_modules="(")
    assert "could search for minutes" in refused(read, target_modules="(a+)+$")
    assert "could search for minutes" in refused(read, rank_pattern={"(a+)+": 4})
    assert "could search for minutes" in refused(read, layers_to_transform=[1], layers_pattern="(a+)+")


def test_html_and_control_characters_stay_in_one_printable_line(read):
    message = refused(read, **{"<b>\n\x1b]0;x\x07\u202e": 5})
    assert "(<b>??]0;x??)" in message and message.isprintable()
    assert len(refused(read, **{"x" * 100_000: 5})) < 500


def test_what_is_passed_on_to_peft(read):
    taken = read(
        r=16,
        lora_alpha=-4.5,
        target_modules=r".*\.fc\d",
        rank_pattern={"^a\\.b": 4, "fc1": 2},
        alpha_pattern={"fc1": 3},
        use_rslora=True,
        layers_pattern=None,
        modules_to_save="head",
    )
    assert taken.lora["modules_to_save"] == ["head"] and taken.lora["rank_pattern"] == {"^a\\.b": 4, "fc1": 2}
    assert "layers_pattern" not in taken.lora and "lora_dropout" not in taken.lora
    assert LoraConfig(**taken.lora).lora_alpha == -4.5


def test_patterns_for_every_layer_of_a_large_model_pass(read):
    """EVA writes a rank for each layer; plain paths cost no search."""
    ranks = {f"model.layers.{i}.self_attn.{name}_proj": 4 for i in range(126) for name in "qkvo"}
    assert len(read(rank_pattern=ranks).lora["rank_pattern"]) == 504


def test_defaults_that_are_taken_are_noted(tmp_path):
    fields = {name: value for name, value in config().items() if name not in ("r", "lora_alpha")}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    notes = read_config(tmp_path / CONFIG).notes
    assert notes == tuple(
        f"adapter_config.json gives no {name}: PEFT's default of {getattr(LoraConfig(), name)} is taken."
        for name in ("r", "lora_alpha")
    )


def test_dropout_is_noted(read):
    taken = read(lora_dropout=0.1)
    assert taken.dropout == 0.1 and taken.notes[0].startswith("lora_dropout is 0.1: training masks the inputs of A")
    assert read(lora_dropout=None).dropout == 0 and read(lora_dropout=0).notes == ()


@pytest.mark.parametrize("name", ["unsloth/vit-bnb-4bit", "x/vit-8bit", "x/model-GPTQ", "x/vit-AWQ"])
def test_a_quantised_base_is_noted(name, read):
    (note,) = read(base_model_name_or_path=name).notes
    assert f"The name of the base, '{name}', says that the base is quantised" in note and "approximate" in note


def test_a_quantisation_field_is_noted_and_other_names_are_not(read):
    assert "The configuration says that the base is quantised" in read(quantization_config={"bits": 4}).notes[0]
    for name in (
        "google/vit-base-patch16-224",
        "paint8/vit_tiny_patch16_224.augreg_in21k",
        "",
        None,
        5,
        ["a"],
        "a" * 9999,
    ):
        assert read(base_model_name_or_path=name).notes == ()


def test_the_name_of_the_base_is_text(read):
    assert read(base_model_name_or_path="google/vit").base_name == "google/vit"
    assert read(base_model_name_or_path="a\nb\x00").base_name == "a?b?"
    assert all(read(base_model_name_or_path=value).base_name is None for value in (None, "", 5, ["a"], {}))
    assert len(read(base_model_name_or_path="a" * 9999).base_name) < 300


@pytest.mark.parametrize(
    "name", ["/home/alice/skin-cancer/vit", "~/vit", "C:\\Users\\alice", "../vit", "./vit", "\\\\host\\a"]
)
def test_a_local_path_is_a_leak(name, read):
    (leak,) = read(base_model_name_or_path=name).leaks
    assert name in leak and "folder of the machine that trained it" in leak


def test_a_name_of_a_hub_is_no_leak(read):
    assert all(read(base_model_name_or_path=name).leaks == () for name in ("google/vit", "timm:vit_tiny", "vit", None))


@pytest.mark.parametrize("field", ["eva_config", "corda_config", "lora_ga_config", "loftq_config"])
def test_the_config_of_another_start_is_noted(field, read):
    """PEFT leaves such a field in place when it converts an adapter at save, and sets init_lora_weights to true."""
    (note,) = read(**{field: {"a": 1}}).notes
    assert field in note and "PEFT ignores" in note
    assert read(**{field: {}}).notes == ()


def test_eva_is_accepted(read):
    taken = read(init_lora_weights="eva", eva_config={"rho": 2.0})
    assert (taken.init, taken.notes, taken.leaks) == ("eva", (), ())


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '"x"', "5", "{", '{"r": 1, "r": 2}', '{"r": Infinity}', "[" * 100_000]
)
def test_what_is_no_object_is_refused(text, tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text(text)
    with pytest.raises(R2FError, match=CONFIG):
        read_adapter(tmp_path / "a")

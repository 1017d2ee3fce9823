"""PEFT folders as PEFT writes them, and as they should not be, read without a base."""

import json

import pytest
from cases import CONFIG, changed_config

from r2f_ext.errors import R2FError
from r2f_ext.models import read_adapter
from r2f_ext.models.adapter_files import HARMLESS_FIELDS, USED_FIELDS, VARIANTS


@pytest.mark.parametrize("field", [*VARIANTS, "a_field_of_a_later_peft"])
def test_every_variant_is_refused_by_name(field, tmp_path, adapter_folder):
    value = {"bias": "all"}.get(field, {"anything": 1})
    with pytest.raises(R2FError, match=field):
        read_adapter(changed_config(adapter_folder, tmp_path / "a", **{field: value}))


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_an_unknown_field_that_is_off_is_accepted(value, tmp_path, adapter_folder):
    fields = {"a_field_of_a_later_peft": value, "use_dora": value}
    assert read_adapter(changed_config(adapter_folder, tmp_path / "a", **fields)).weights


def test_every_field_of_peft_at_its_default_is_accepted(tmp_path, adapter_folder):
    """What LoraConfig writes today; fields that are neither used, harmless nor named variants are still refused."""
    plain = json.loads((adapter_folder / CONFIG).read_text())
    unknown = plain.keys() - {*USED_FIELDS, *HARMLESS_FIELDS, *VARIANTS, "init_lora_weights"}
    assert read_adapter(adapter_folder).weights
    for name in unknown:
        with pytest.raises(R2FError, match=f"not known here .{name}."):
            read_adapter(changed_config(adapter_folder, tmp_path / name, **{name: "changed"}))


def test_harmless_fields_may_have_any_value(tmp_path, adapter_folder):
    fields = {name: "anything" for name in HARMLESS_FIELDS if name != "peft_type"}
    assert read_adapter(changed_config(adapter_folder, tmp_path / "a", **fields)).weights


def test_nothing_in_the_config_reaches_the_outside(tmp_path, adapter_folder):
    folder = changed_config(
        adapter_folder,
        tmp_path / "a",
        base_model_name_or_path="somewhere/else",
        revision="x",
        auto_mapping={"base_model_class": "os", "parent_library": "os"},
    )
    assert not {"base_model_name_or_path", "revision", "auto_mapping"} & read_adapter(folder).config.keys()
    assert "auto_mapping" in json.loads((folder / CONFIG).read_text())

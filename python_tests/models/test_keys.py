"""Names of tensors: PEFT's own form, and those of other programs."""

import pytest
import torch
from adapter_cases import PATHS, PREFIX, factors

from r2f_ext.errors import R2FError
from r2f_ext.models.keys import canonical

ONE = torch.ones(1)
A, B = (f"{PREFIX}{PATHS[0]}.lora_{kind}.weight" for kind in "AB")


def test_peft_keys_stay_without_a_note():
    keys = canonical(factors(), "it")
    assert list(keys.weights) == list(factors()) and not keys.saved and not keys.notes


def test_saved_modules_lose_what_peft_puts_around_them():
    names = (
        "head.weight",
        "norm.modules_to_save.default.weight",
        "a.base_layer.bias",
        "_orig_mod.b.weight",
        "class_token",
    )
    keys = canonical({A: ONE, B: ONE, **{PREFIX + name: ONE for name in names}}, "it")
    assert keys.saved.keys() == {"head.weight", "norm.weight", "a.bias", "b.weight", "class_token"}
    untouched = canonical({A: ONE, B: ONE, f"{PREFIX}head.original_module.weight": ONE}, "it")
    assert not untouched.saved


def test_each_rename_is_noted():
    def notes(rename):
        return " ".join(canonical({rename(key): ONE for key in (A, B)}, "it").notes)

    assert "_orig_mod (torch.compile)" in notes(lambda key: f"_orig_mod.{key}")
    assert "_fsdp_wrapped_module (FSDP)" in notes(lambda key: key.replace(".attn", "._fsdp_wrapped_module.attn"))
    assert "_checkpoint_wrapped_module (activation" in notes(lambda key: f"_checkpoint_wrapped_module.{key}")
    assert "module (DistributedDataParallel)" in notes(lambda key: f"module.{key}")
    assert "a second base_model.model" in notes(lambda key: PREFIX + key)
    assert "model (a module around PEFT's" in notes(lambda key: f"model.{key}")
    assert "the adapter's name other" in notes(lambda key: key.replace(".weight", ".other.weight"))
    assert "lack PEFT's base_model.model" in notes(lambda key: key.removeprefix(PREFIX))


def test_a_part_of_the_base_called_module_is_kept():
    keys = canonical({f"{PREFIX}module.fc.lora_{kind}.weight": ONE for kind in "AB"}, "it")
    assert set(keys.weights) == {f"{PREFIX}module.fc.lora_{kind}.weight" for kind in "AB"} and not keys.notes


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_unet_down_blocks_0_attn.lora_down.weight", "is of kohya or diffusers"),
        ("lora_te1_text_model_encoder.alpha", "is of kohya or diffusers"),
        ("unet.down.processor.to_q_lora.down.weight", "holds no LoRA factors"),
        ("unet.down_blocks.0.attn.to_q.lora.up.weight", "is of kohya or diffusers"),
        ("transformer.blocks.0.attn.to_q.lora_A.weight", "is of diffusers (a generative pipeline)"),
        (f"{PREFIX}blocks.0.attn.qkv.lora_magnitude_vector", "is of DoRA"),
        (f"{PREFIX}embed.lora_embedding_A", "is of LoRA on an embedding table"),
        (f"{PREFIX}fc.lora_B.bias", "is of LoRA with a bias of its own"),
        ("blocks.0.attn.qkv.lora_A", "is of loralib"),
        (f"{PREFIX}fc.lora_E", "is of another method than LoRA"),
        (f"{PREFIX}fc.hada_w1_a", "is of another method than LoRA"),
        ("head.weight", r"holds no LoRA factors (lora_A, lora_B); it holds head.weight: audit"),
        ("", "a name of 0 characters"),
        ("x" * 501, "a name of 501 characters"),
        ("../../etc/passwd.lora_A.weight", "'../../etc/passwd.lora_A.weight', which no module can be called"),
        ("<script>alert(1)</script>.lora_A.weight", "which no module can be called"),
        ("a\nb\x1b[31m.lora_A.weight", "'a?b?[31m.lora_A.weight', which no module can be called"),
        ("a..b.lora_A.weight", "which no module can be called"),
        ("/a.weight", "which no module can be called"),
    ],
)
def test_foreign_and_impossible_names(name, said):
    with pytest.raises(R2FError) as caught:
        canonical({name: ONE}, "it")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_mixed_adapters_and_doubled_tensors():
    mixed = {A.replace(".weight", f".{name}.weight"): ONE for name in ("one", "two")}
    with pytest.raises(R2FError, match=r"several adapters \(one, two\)"):
        canonical(mixed, "it")
    with pytest.raises(R2FError, match="one tensor twice"):
        canonical({A: ONE, PREFIX + A: ONE}, "it")
    with pytest.raises(R2FError, match="no LoRA factors"):
        canonical({}, "it")

"""PEFT folders as PEFT writes them, and as they should not be, read without a base."""

import json
import shutil
import warnings

import pytest
import torch
from adapter_cases import PATHS, PREFIX, WEIGHTS, factors, write
from cases import CONFIG, changed_config, changed_weights, peft_model, save
from safetensors.torch import load_file, save_file

from r2f_ext.errors import R2FError
from r2f_ext.models import read_adapter
from r2f_ext.models.adapter_files import read_factors

HEAD = {f"{PREFIX}head.weight": torch.ones(7, 16), f"{PREFIX}head.bias": torch.ones(7)}


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


def test_what_peft_writes_is_read_as_it_stands(adapter_folder):
    files = read_adapter(adapter_folder)
    stored = load_file(adapter_folder / WEIGHTS)
    assert files.weights.keys() == stored.keys() and not files.saved
    assert all(torch.equal(files.weights[name], tensor) for name, tensor in stored.items())
    assert files.facts.notes == () and files.facts.leaks == () and files.facts.dropped == ()
    assert (files.facts.name, files.facts.init, files.facts.dropout) == ("one", "true", 0.0)


def test_a_saved_head_is_set_apart(tmp_path):
    files = read_adapter(write(tmp_path / "a", {**factors(), **HEAD}, modules_to_save=["head"]))
    assert files.saved.keys() == {"head.weight", "head.bias"} and files.num_classes == 7
    assert len(files.weights) == 4 and files.facts.notes == ()
    assert files.config["modules_to_save"] == ["head"]


def test_without_a_saved_head_the_number_of_classes_is_not_known(tmp_path):
    assert read_adapter(write(tmp_path / "a")).num_classes is None
    odd = {f"{PREFIX}head.weight": torch.ones(7)}
    assert read_adapter(write(tmp_path / "b", {**factors(), **odd})).num_classes is None


def test_whole_tensors_that_the_configuration_does_not_name_are_listed(tmp_path):
    extra = {f"{PREFIX}norm.weight": torch.ones(3), f"{PREFIX}blocks.0.attn.qkv.base_layer.weight": torch.ones(24, 16)}
    files = read_adapter(write(tmp_path / "a", {**factors(), **HEAD, **extra}, modules_to_save=["head"]))
    assert files.saved.keys() == {"head.weight", "head.bias", "norm.weight", "blocks.0.attn.qkv.weight"}
    (note,) = files.facts.notes
    assert "(blocks.0.attn.qkv.weight, norm.weight)" in note and "does not name" in note


def test_an_unchanged_adapter_names_what_else_is_saved(tmp_path):
    zero = {name: tensor * (".lora_A" in name) for name, tensor in factors().items()}
    with pytest.raises(R2FError, match="every B is zero, so it is unchanged by training as far as the factors show;"):
        read_adapter(write(tmp_path / "a", zero))
    files = read_adapter(write(tmp_path / "b", {**zero, **HEAD}, modules_to_save=["head"]))
    assert files.weights == {} and files.facts.dropped == PATHS
    (note,) = files.facts.notes
    assert "zero in all 2 adapted layers" in note and "(head.bias, head.weight) is audited" in note
    assert read_factors(tmp_path / "a").keys() == zero.keys()  # an adapter saved untrained is where A_0 is read


def test_layers_whose_b_is_zero_are_dropped_and_listed(tmp_path):
    tensors = factors()
    tensors[f"{PREFIX}{PATHS[0]}.lora_B.weight"].zero_()
    files = read_adapter(write(tmp_path / "a", tensors))
    assert files.facts.dropped == (PATHS[0],)
    assert files.weights.keys() == {f"{PREFIX}{PATHS[1]}.lora_{kind}.weight" for kind in "AB"}
    (note,) = files.facts.notes
    assert f"B is zero in 1 of 2 adapted layers ({PATHS[0]})" in note


def test_facts_of_the_configuration_arrive(tmp_path):
    files = read_adapter(write(tmp_path / "a", lora_dropout=0.1, base_model_name_or_path="google/vit"))
    assert files.facts.dropout == 0.1 and files.facts.base_name == "google/vit"
    (note,) = files.facts.notes
    assert note.startswith("lora_dropout is 0.1: ")


def test_eva_is_a_leak_only_where_the_rows_of_a_are_as_eva_makes_them(tmp_path):
    random = factors(rank=4, d_in=64)
    files = read_adapter(write(tmp_path / "a", random, init_lora_weights="eva", eva_config={"rho": 2.0}))
    (note,) = files.facts.notes
    assert "no more orthogonal than random" in note and files.facts.leaks == () and files.facts.init == "eva"
    eva = {n: torch.linalg.qr(t.T)[0].T.contiguous() if ".lora_A" in n else t for n, t in random.items()}
    files = read_adapter(write(tmp_path / "b", eva, init_lora_weights="eva"))
    assert "EVA makes A from the inputs" in files.facts.leaks[0] and files.facts.notes == ()


def test_sharded_files_are_read_through_their_index(tmp_path):
    whole, folder = factors(), write(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    names = sorted(whole)
    parts = {
        "adapter_model-00001-of-00002.safetensors": names[:2],
        "adapter_model-00002-of-00002.safetensors": names[2:],
    }
    for file, keys in parts.items():
        save_file({key: whole[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    files = read_adapter(folder)
    assert files.weights.keys() == whole.keys()
    assert all(torch.equal(files.weights[name], tensor) for name, tensor in whole.items())

    index.write_text(json.dumps({"weight_map": dict(list(weight_map.items())[:-1])}))
    with pytest.raises(R2FError, match="its index disagree about"):
        read_adapter(folder)
    (folder / "adapter_model-00002-of-00002.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(R2FError, match=r"00002-of-00002.safetensors does not exist: copy the whole folder"):
        read_adapter(folder)


def test_half_precision_is_read_as_stored(tmp_path):
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        tensors = {name: tensor.to(kind) for name, tensor in factors().items()}
        files = read_adapter(write(tmp_path / str(kind), tensors))
        assert {tensor.dtype for tensor in files.weights.values()} == {kind}


def test_peft_with_several_adapters_writes_folders_that_are_named(tmp_path, embedded):
    """One adapter is called default, the other gets a folder of its own; a checkpoint folder holds them deeper."""
    from peft import LoraConfig

    model = peft_model(embedded)
    model.add_adapter("second one", LoraConfig(r=8, target_modules=["attn.proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    folder = save(model, tmp_path / "run" / "checkpoint-1")
    (note,) = read_adapter(folder).facts.notes
    assert "other adapters in second one" in note
    assert read_adapter(folder / "second one").facts.notes == ()
    (folder / CONFIG).unlink()
    (folder / WEIGHTS).unlink()
    with pytest.raises(R2FError, match="an adapter lies in its folder second one: name that one"):
        read_adapter(folder)
    with pytest.raises(R2FError, match="an adapter lies in its folder checkpoint-1/second one: name that one"):
        read_adapter(tmp_path / "run")


def test_what_lies_beside_is_named_and_not_opened(tmp_path):
    folder = write(tmp_path / "a")
    for name in ("optimizer.pt", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json", "adapter_model.bin"):
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n")
    leaks = read_adapter(folder).facts.leaks
    assert len(leaks) == 4 and all("was not opened" in leak for leak in leaks)
    given = "beside the adapter; a file of this kind gives away"
    assert any(f"rng_state_0.pth, rng_state_1.pth lie {given}" in leak for leak in leaks)
    assert any(f"optimizer.pt lies {given}" in leak for leak in leaks)


def test_a_copy_of_peft_key_by_key_agrees_after_renaming(tmp_path, adapter_folder):
    """Wrappers, prefixes and adapter names in the keys change nothing of what is read, and leave a note."""
    plain = read_adapter(adapter_folder).weights
    forms = {
        "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
        "compiled outside": lambda key: f"_orig_mod.{key}",
        "fsdp": lambda key: key.replace(PREFIX, f"{PREFIX}_fsdp_wrapped_module.").replace(
            ".attn", "._fsdp_wrapped_module.attn"
        ),
        "bare": lambda key: key.removeprefix(PREFIX),
        "twice": lambda key: PREFIX + key,
        "named": lambda key: key.replace("_A.weight", "_A.default.weight").replace("_B.weight", "_B.default.weight"),
        "parallel": lambda key: f"module.{key}",
        "lightning": lambda key: f"model.{key}",
    }
    for name, rename in forms.items():
        changed = changed_weights(adapter_folder, tmp_path / name, lambda w, r=rename: {r(k): v for k, v in w.items()})
        files = read_adapter(changed)
        assert files.weights.keys() == plain.keys(), name
        assert all(torch.equal(files.weights[key], tensor) for key, tensor in plain.items())
        assert len(files.facts.notes) == 1, (name, files.facts.notes)


def test_the_pickle_of_peft_is_refused_with_a_remedy_that_works(tmp_path, embedded):
    from peft import PeftModel

    model = peft_model(embedded)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    folder = tmp_path / "a"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), safe_serialization=False)
        with pytest.raises(R2FError, match=r"PeftModel.from_pretrained\(BASE, FOLDER\).save_pretrained\(FOLDER\)"):
            read_adapter(folder)
        PeftModel.from_pretrained(peft_model(embedded).unload(), str(folder)).save_pretrained(str(folder))
    assert read_adapter(folder).facts.leaks[0].startswith("adapter_model.bin lies beside")
    shutil.rmtree(folder)
    with pytest.raises(R2FError, match="does not exist"):
        read_adapter(folder)

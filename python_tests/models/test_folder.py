"""The files of an adapter folder: what may be read, what is named, and which folder or file to pass instead."""

import json
import os
import shutil

import pytest
import torch
from adapter_cases import CONFIG, PREFIX, WEIGHTS, write
from safetensors.torch import save_file

from r2f_ext.errors import R2FError
from r2f_ext.models import read_adapter
from r2f_ext.models.adapter_files import read_factors
from r2f_ext.models.folder import BESIDE, adapters_below, leaks_beside, names_in

KOHYA = {"lora_unet_mid.lora_down.weight": torch.ones(4, 8), "lora_unet_mid.lora_up.weight": torch.ones(8, 4)}


def refused(path) -> str:
    with pytest.raises(R2FError) as caught:
        read_adapter(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_folder_says_what_it_is(tmp_path):
    folder = write(tmp_path / "a")
    assert "a/none' does not exist: pass a folder" in refused(folder / "none")
    assert "does not exist" in refused(folder / ("x" * 5000)) and len(refused(folder / ("x" * 5000))) < 600
    for name in (CONFIG, WEIGHTS):
        assert f"is a file of an adapter: pass the folder that holds it, '{folder}'" in refused(folder / name)
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt' is not a folder: pass the folder with adapter_config.json" in refused(tmp_path / "notes.txt")
    assert "does not exist" in refused(folder / WEIGHTS / "deeper")
    with pytest.raises(R2FError, match="does not exist"):
        read_factors(folder / "none")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "is not a folder" in refused(tmp_path / "pipe.safetensors")


def test_single_files_of_other_programs_are_named(tmp_path):
    save_file(KOHYA, tmp_path / "x.safetensors")
    assert "x.safetensors' is of kohya or diffusers (lora_down, lora_up), as its tensor" in refused(
        tmp_path / "x.safetensors"
    )
    folder = tmp_path / "diffusers"
    folder.mkdir()
    shutil.copy(tmp_path / "x.safetensors", folder / "pytorch_lora_weights.safetensors")
    assert "is of kohya or diffusers" in refused(folder)
    save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors")
    assert f"y.safetensors' comes without {CONFIG}, which gives rank" in refused(tmp_path / "y.safetensors")


def test_a_folder_without_configuration_says_what_it_holds(tmp_path):
    folder = write(tmp_path / "a")
    (folder / CONFIG).unlink()
    assert f"has no {CONFIG}, which gives rank, scale and layers of {WEIGHTS}" in refused(folder)
    (tmp_path / "empty").mkdir()
    assert f"has no {CONFIG}: pass a folder written by PEFT's save_pretrained." in refused(tmp_path / "empty")


def test_the_adapters_below_are_listed_to_be_named(tmp_path):
    for name in ("one", "two", "checkpoint-5/inner"):
        write(tmp_path / "run" / name)
    (tmp_path / "run" / "loop").symlink_to(tmp_path / "run")
    assert "adapters lie in its folders checkpoint-5/inner, one, two: name one of them." in refused(tmp_path / "run")
    for i in range(20):
        write(tmp_path / "run" / f"many{i:02}<b>")
    assert "many06<b> and 15 more: name one of them" in refused(tmp_path / "run")


def test_missing_weights(tmp_path):
    folder = write(tmp_path / "a")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "holds its weights in adapter_model.bin only, a pickle, which is never opened: where you" in refused(folder)
    (folder / "adapter_model.bin").unlink()
    assert f"has no {WEIGHTS}: save the adapter" in refused(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_out_of_the_folder_are_not_followed(name, tmp_path):
    folder, other = write(tmp_path / "a"), write(tmp_path / "b")
    (folder / name).unlink()
    for target in (other / name, f"../b/{name}", "/dev/zero", "/etc/passwd", "missing/../../b/" + name):
        (folder / name).symlink_to(target)
        assert f"{name} links out of its folder, which is not followed: copy the file there." in refused(folder)
        (folder / name).unlink()
    (folder / name).symlink_to("elsewhere")
    assert f"{name} is a link to a file that does not exist" in refused(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(name)  # a circle
    assert name in refused(folder)


def test_links_within_the_folder_and_the_hub_cache_are_followed(tmp_path):
    folder = write(tmp_path / "a")
    (folder / WEIGHTS).rename(folder / "real")
    (folder / WEIGHTS).symlink_to("real")
    assert read_adapter(folder).weights
    (tmp_path / "link").symlink_to(folder)
    assert read_adapter(tmp_path / "link").facts.name == "a"

    cache = tmp_path / "models--someone--lora"
    snapshot, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, blob in ((CONFIG, "aa"), (WEIGHTS, "bb")):
        shutil.copy(folder / name, blobs / blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    assert read_adapter(snapshot).weights.keys() == read_adapter(folder).weights.keys()
    blobs.rename(tmp_path / "outside")
    blobs.symlink_to(tmp_path / "outside")
    assert "links out of its folder" in refused(snapshot)


@pytest.mark.parametrize(
    "name",
    [
        "../adapter_model-00001-of-00001.safetensors",
        "/etc/passwd",
        "adapter_model.bin",
        "",
        5,
        None,
        ["a"],
        CONFIG,
        "sub/adapter_model-00001-of-00001.safetensors",
        "adapter_model-00001-of-00001.safetensors\n",
        "<b>x</b>",
    ],
)
def test_an_index_may_only_name_shards_of_its_folder(name, tmp_path):
    folder = write(tmp_path / "a")
    shutil.copy(folder / WEIGHTS, tmp_path / "adapter_model-00001-of-00001.safetensors")
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {f"{PREFIX}a.lora_A.weight": name}}))
    assert "which is no shard of this folder" in refused(folder)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": "x"}, {"weight_map": None}]
)
def test_an_index_without_tensors_is_refused(index, tmp_path):
    folder = write(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "names no tensors (weight_map)" in refused(folder)


def test_an_index_with_more_shards_than_any(tmp_path):
    folder = write(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    shards = {f"x{i}": f"adapter_model-{i:05}-of-09999.safetensors" for i in range(1001)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))
    assert "names 1001 shards, more than the 1000" in refused(folder)


def test_every_kind_of_leaking_file_is_found_by_its_name(tmp_path):
    names = (
        "optimizer.pt",
        "optimizer.bin",
        "optimizer_0",
        "rng_state.pth",
        "rng_state_3.pth",
        "trainer_state.json",
        "training_args.bin",
        "scheduler.pt",
        "scaler.pt",
        "events.out.tfevents.1700.host.1.0",
        "all_results.json",
        "checkpoint-500",
        "global_step20",
        "runs",
        "adapter_model.bin",
        "model.ckpt",
        "cat.jpg",
        "train.csv",
    )
    for name in names:
        (tmp_path / name).touch()
    sentences = list(leaks_beside(tmp_path))
    assert len(sentences) == len(BESIDE)
    assert all(sum(name in sentence for sentence in sentences) == 1 for name in names if name != "optimizer_0")


def test_usual_files_are_no_leak(tmp_path):
    for name in (CONFIG, WEIGHTS, "README.md", "tokenizer.json", "preprocessor_config.json", ".gitattributes"):
        (tmp_path / name).touch()
    assert list(leaks_beside(tmp_path)) == []


def test_looking_into_folders_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("r2f_ext.models.folder.MAX_ENTRIES", 3)
    for i in range(9):
        write(tmp_path / str(i) / "deep" / "deeper" / "deepest")
    assert len(names_in(tmp_path)) == 3 and adapters_below(tmp_path) == []
    assert names_in(tmp_path / "none") == []

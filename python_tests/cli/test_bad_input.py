"""Bad input to every command: one sentence, the right code, nothing half-written."""

import copy
import errno
import json
import os
import re
import shutil

import pytest
import torch
from cases import CONFIG, WEIGHTS, changed_config, changed_weights, peft_model, save
from cli_cases import FIRST, NAMES, commands_with_out, edit_manifest, files_under, pairs_of, refused, run
from peft import IA3Config, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from r2f_ext import files

A_KEY = f"base_model.model.{FIRST}.lora_A.weight"
B_KEY = f"base_model.model.{FIRST}.lora_B.weight"


def without(name):
    return lambda source, to: os.remove(shutil.copytree(source, to) / name)


def truncated(source, to):
    path = shutil.copytree(source, to) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_only(source, to):
    (shutil.copytree(source, to) / WEIGHTS).unlink()
    torch.save({}, to / "adapter_model.bin")


def text(content):
    return lambda source, to: (shutil.copytree(source, to) / CONFIG).write_text(content)


def config(**fields):
    return lambda source, to: changed_config(source, to, **fields)


def weights(change):
    return lambda source, to: changed_weights(source, to, change)


def nan_in_b(tensors):
    tensors[B_KEY][3, 1] = float("nan")
    return tensors


def wider(tensors):
    return {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in tensors.items()}


ADAPTERS = {
    "missing folder": (lambda source, to: None, "does not exist"),
    "a file": (lambda source, to: to.write_text("x"), "is a file, not a folder"),
    "empty folder": (lambda source, to: to.mkdir(), f"has no {CONFIG}"),
    "missing config": (without(CONFIG), f"has no {CONFIG}"),
    "missing safetensors": (without(WEIGHTS), f"has no {WEIGHTS}"),
    "truncated safetensors": (truncated, "bytes of tensors and .* are there"),
    "pickle only": (pickle_only, "a pickle, which is never opened"),
    "broken JSON": (text("{"), "holds damaged JSON"),
    "JSON list": (text("[1]"), "does not hold a JSON object"),
    "empty config": (text(""), "holds damaged JSON"),
    "DoRA": (config(use_dora=True), "DoRA"),
    "IA3": (config(peft_type="IA3"), "has peft_type IA3"),
    "LoRA bias": (config(lora_bias=True), "LoRA bias"),
    "trained biases": (config(bias="all"), "trained biases"),
    "pissa": (config(init_lora_weights="pissa"), "has init_lora_weights .*path_initial_model_for_weight_conversion"),
    "other rank in config": (config(r=4), "has 8 rows, while .* gives r = 4"),
    "other rank pattern": (
        config(rank_pattern={"attn.qkv": 2}),
        f"rank 2 for {FIRST} in its config.* and 8 in its file",
    ),
    "other input width": (weights(wider), "does not fit base 'embedded'"),
    "layers the base lacks": (
        weights(lambda w: {k.replace("blocks.3", "blocks.9"): v for k, v in w.items()}),
        "does not fit base 'embedded'",
    ),
    "modules the base lacks": (config(target_modules=["q_proj"]), "Target modules .*q_proj.* not found"),
    "half of the factors": (weights(lambda w: {k: v for k, v in w.items() if k != A_KEY}), f"B of {FIRST} but no A"),
    "no factors": (weights(lambda w: {"x": torch.zeros(1)}), "holds no LoRA factors"),
    "NaN": (weights(nan_in_b), "NaN or infinity in"),
    "infinity": (weights(lambda w: {k: v / 0 for k, v in w.items()}), "NaN or infinity in"),
    "all-zero B": (weights(lambda w: {k: v * ("lora_A" in k) for k, v in w.items()}), "every B is zero"),
}


@pytest.mark.parametrize(("make", "words"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_bad_adapters(make, words, adapter_folder, tmp_path, out, capsys):
    make(adapter_folder, tmp_path / "adapter")
    line = refused(capsys, *pairs_of(tmp_path / "adapter", out))
    assert re.search(words, line) and "adapter" in line
    assert not out.exists() or not files_under(out)


def test_a_real_ia3_and_a_real_dora_adapter(embedded, tmp_path, out, capsys):
    ia3 = get_peft_model(copy.deepcopy(embedded.model), IA3Config(target_modules=["attn.qkv"], feedforward_modules=[]))
    assert "only plain LoRA" in refused(capsys, *pairs_of(save(ia3, tmp_path / "ia3"), out))
    dora = peft_model(embedded, use_dora=True)
    assert "DoRA" in refused(capsys, *pairs_of(save(dora, tmp_path / "dora"), out))


BASES = {
    "bad timm name": ("timm:vit_no_such_thing", "unknown base model"),
    "missing folder": ("/no/such/base", "unknown base"),
    "empty timm name": ("timm:", "unknown base .timm:.: name a model after"),
}


@pytest.mark.parametrize(("base", "words"), BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("command", ["pairs", "audit", "phase0"])
def test_unknown_bases(base, words, command, adapter_folder, out, capsys):
    adapter = [] if command == "phase0" else [adapter_folder]
    assert re.search(words, refused(capsys, command, *adapter, "--base", base, "--out", out))
    assert not out.exists() or not files_under(out)


@pytest.mark.parametrize("command", ["pairs", "audit"])
@pytest.mark.parametrize("images", [0, 1])
def test_proxies_without_enough_images(images, command, adapter_folder, tmp_path, out, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(images):
        Image.new("RGB", (32, 32), (i, 90, 200)).save(folder / f"{i}.png")
    line = refused(capsys, command, adapter_folder, "--proxy", folder, "--count", 40, "--out", out)
    assert ("has no images" if images == 0 else "needs at least 2 images") in line
    assert not files_under(out)


@pytest.mark.parametrize("name", NAMES)
def test_out_that_cannot_be_written_to(name, stages, tmp_path, capsys, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("mine")
    words = commands_with_out(stages)[name]
    for place in (blocker, blocker / "below"):
        assert "choose another folder" in refused(capsys, *words, "--out", place)
    assert blocker.read_text() == "mine"

    def denied(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", denied)
    assert "(Permission denied)" in refused(capsys, *words, "--out", tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(adapter_folder, tmp_path, capsys):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "Permission denied" in refused(capsys, *pairs_of(adapter_folder, closed))


PAIRS = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no finished pairs"),
    "broken manifest": (lambda f: (f / "manifest.json").write_text("{"), "is damaged"),
    "damaged manifest": (lambda f: edit_manifest(f, layers=[{"name": "x"}]), "is damaged"),
    "other schema": (lambda f: edit_manifest(f, schema=0), "schema 0"),
    "missing shard": (lambda f: (f / "pairs-00000.safetensors").unlink(), "missing or damaged"),
    "torn shard": (lambda f: os.truncate(f / "pairs-00000.safetensors", 5000), "missing or damaged"),
    "missing start": (lambda f: (f / "start.safetensors").unlink(), "missing or damaged"),
    "not a folder": (lambda f: shutil.rmtree(f), "no finished pairs"),
}


@pytest.mark.parametrize("name", ["fit", "decode", "invert"])
@pytest.mark.parametrize(("damage", "words"), PAIRS.values(), ids=PAIRS.keys())
def test_damaged_pairs(damage, words, name, stages, tmp_path, out, capsys):
    folder = shutil.copytree(stages.pairs, tmp_path / "pairs")
    damage(folder)
    command = [folder if word == stages.pairs else word for word in commands_with_out(stages)[name]]
    assert words in refused(capsys, *command, "--out", out)
    assert not files_under(out)


def test_too_few_pairs_to_fit(stages, tmp_path, out, capsys):
    assert run("pairs", stages.adapter, "--count", 10, "--proxy", "embedded", "--out", tmp_path / "p") == 0
    assert "at least 20 are needed" in refused(capsys, "fit", tmp_path / "p", "--out", out)
    line = refused(capsys, "invert", stages.adapter, "--pairs", tmp_path / "p", "--out", out)
    assert "at least 20 proxy pairs" in line and not files_under(out)


def test_victims_that_diverge_and_pairs_that_are_not_finite(stages, tmp_path, out, capsys):
    line = refused(capsys, *pairs_of(stages.adapter, out), "--steps", 3, "--lr", "1e9")
    assert "the training of victim 0 diverged" in line and "--lr 1e+09 is too large" in line and not files_under(out)
    folder = shutil.copytree(stages.pairs, tmp_path / "pairs")
    tensors = load_file(folder / "pairs-00000.safetensors")
    tensors[f"update/{FIRST}"][3, 0, 0] = float("nan")
    save_file(tensors, folder / "pairs-00000.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = files.sha256(folder / "pairs-00000.safetensors")
    edit_manifest(folder, shards=manifest["shards"])
    for words in (("fit", folder), ("invert", stages.adapter, "--pairs", folder)):
        assert f"holds NaN or infinity in update/{FIRST}" in refused(capsys, *words, "--out", out)

"""`r2f pairs`: the files it writes, runs that go on, and victims that train."""

import io
import json
import os
import shutil
import sys

import torch
from cases import cosine, victim
from cli_cases import files_under, pairs_of, refused, run
from safetensors.torch import load_file

from r2f_ext.pairs import StoredPairs


def test_pairs_wrote_pairs(stages, embedded, bound):
    stored = StoredPairs(stages.pairs, embedded)
    assert stored.manifest["precision"] == "float32"
    assert len(stored) == 40 and stored.manifest["proxy"] == "embedded" and stored.manifest["base"] == "embedded"
    assert stored.target.layers == bound[0].layers
    shard = ["factors-00000.safetensors", "manifest.json", "pairs-00000.safetensors"]
    assert files_under(stages.pairs) == [*shard, "start.safetensors"]


def test_the_same_seed_makes_the_same_pairs(stages, tmp_path):
    again = ("pairs", stages.adapter, "--count", 40, "--proxy", "embedded", "--out")
    assert run(*again, tmp_path / "a") == 0 and run(*again, tmp_path / "b", "--seed", 1) == 0
    labels = [
        load_file(f / "pairs-00000.safetensors")["images"] for f in (stages.pairs, tmp_path / "a", tmp_path / "b")
    ]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])


def test_pairs_in_bfloat16(stages, tmp_path):
    out = tmp_path / "low"
    assert (
        run("pairs", stages.adapter, "--count", 4, "--proxy", "embedded", "--precision", "bfloat16", "--out", out) == 0
    )
    assert json.loads((out / "manifest.json").read_text())["precision"] == "bfloat16"
    got, full = (load_file(folder / "pairs-00000.safetensors") for folder in (out, stages.pairs))
    names = [name for name in got if name.startswith("update/")]
    assert names and all(cosine(got[n], full[n][:4]).min() > 0.999 for n in names)


def test_pairs_of_victims_that_train_for_steps(stages, tmp_path, capsys):
    out = tmp_path / "long"
    words = ("pairs", stages.adapter, "--count", 4, "--proxy", "embedded", "--steps", 3, "--samples", 2, "--lr", 0.05)
    assert run(*words, "--out", out) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["count"] == 4 and manifest["group_size"] == 2
    assert manifest["training"]["steps"] == 3 and manifest["training"]["lr"] == 0.05
    tensors = load_file(out / "pairs-00000.safetensors")
    assert len(tensors["images"]) == 4 and tensors["images"].shape[1] == 2
    assert refused(capsys, *words, "--momentum", -1, "--out", out).startswith("r2f pairs: the victims' training")


def test_what_stands_in_for_the_start_of_a_is_said(stages, embedded, private, tmp_path, capsys):
    trained = victim(embedded, tmp_path / "trained", private.batch([1]), private.labels[1:2], steps=10)
    for adapter, told in ((stages.adapter, 0), (trained, 1)):
        capsys.readouterr()
        assert run("pairs", adapter, "--count", 2, "--proxy", "embedded", "--out", tmp_path / f"told-{told}") == 0
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("A before training is not known: its final A stands in for it, in the proxies too.") == told


def test_pairs_of_a_second_adapter_from_the_first_ones(stages, embedded, private, tmp_path, capsys):
    other = victim(embedded, tmp_path / "other", private.batch([1]), private.labels[1:2], r=4)
    cached = ("pairs", other, "--count", 10, "--cache", stages.pairs, "--out", tmp_path / "cached")
    assert run(*cached) == 0
    assert run("pairs", other, "--count", 10, "--proxy", "embedded", "--out", tmp_path / "anew") == 0
    got, expected = (load_file(tmp_path / f / "pairs-00000.safetensors") for f in ("cached", "anew"))
    names = [name for name in expected if name.startswith("update/")]
    assert names and all(cosine(got[n], expected[n]).min() > 0.9999 for n in names)
    assert json.loads((tmp_path / "cached" / "manifest.json").read_text())["proxy"] == "embedded"
    for more in (("--steps", 2), ("--dense",)):
        assert "leave training and --dense out" in refused(capsys, *cached, *more)
    same = ("pairs", other, "--cache", stages.pairs, "--out", stages.pairs)
    assert "are the same folder" in refused(capsys, *same) and (stages.pairs / "manifest.json").exists()


def test_the_same_pairs_again_and_others_in_their_place(stages, tmp_path, capsys):
    folder, printed = shutil.copytree(stages.pairs, tmp_path / "pairs"), tmp_path / "p.json"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    same = ("pairs", stages.adapter, "--count", 40, "--proxy", "embedded", "--out", folder, "--json", printed)
    assert run(*same) == 0
    assert "holds these 40 pairs already" in " ".join(capsys.readouterr().out.split())
    assert json.loads(printed.read_text())["made"] == 0
    for more, words in ((("--seed", 1), "other proxy images"), (("--count", 30), "count 40, not 30")):
        line = refused(capsys, *same, *more)
        assert "finished pairs of another recipe" in line and words in line and "another --out" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "pairs-00000.safetensors").unlink()
    assert run(*same) == 0 and json.loads(printed.read_text())["made"] == 40
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_unfinished_run_goes_on_or_starts_anew_and_says_which(stages, out, capsys, monkeypatch):
    monkeypatch.setattr("r2f_ext.pairs.generate.BATCH_GROUPS", 10)
    with monkeypatch.context() as patch:
        patch.setattr("r2f_ext.pairs.shards._finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        line = refused(capsys, *pairs_of(stages.adapter, out), code=130)
        assert "the same command goes on from what is finished" in line
    (out / "pairs-00001.safetensors").write_bytes(b"torn")
    assert run(*pairs_of(stages.adapter, out), "--json", out.parent / "j") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "holds 10 of the 20 pairs: only the others are made" in said and "10 pairs made" in said
    assert json.loads((out.parent / "j").read_text())["made"] == 10
    (out / "manifest.json").unlink()
    (out / "pairs-00000.json").write_text(json.dumps({"name": "pairs-00000.safetensors", "run": "another"}))
    assert run(*pairs_of(stages.adapter, out)) == 0
    assert "unfinished pairs of another recipe: they are removed" in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_the_terminal_cannot_show(adapter_folder, tmp_path, monkeypatch):
    """An ASCII terminal, and a folder whose name is not valid in any encoding."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    out = tmp_path / os.fsdecode("ünï→".encode() + b"\xff")
    assert run("pairs", adapter_folder, "--count", 4, "--proxy", "embedded", "--out", out) == 0
    shown.flush()
    assert b"\\u2192" in shown.buffer.getvalue() and (out / "manifest.json").exists()

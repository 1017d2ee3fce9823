"""`r2f fit` on pairs of many A's, and its log."""

import json
import sys

import pytest
import torch
from cases import cosine, victim
from cli_cases import files_under, refused, run
from safetensors.torch import load_file

from r2f_ext.capture import Capture
from r2f_ext.decoders.mlp import MLP
from r2f_ext.models import attach, read_adapter


@pytest.fixture(scope="module")
def many(stages, tmp_path_factory):
    """Folders of 60 pairs of many A's, and of the decoders of them."""
    folder = tmp_path_factory.mktemp("many")
    words = ("pairs", stages.adapter, "--count", 60, "--proxy", "embedded", "--per-victim-a", "--out", folder / "p")
    assert run(*words) == 0
    assert run("fit", folder / "p", "--out", folder / "d", "--json", folder / "fit.json") == 0
    return folder


def decode(adapter, many, out):
    return ("decode", adapter, "--pairs", many / "p", "--decoders", many / "d", "--out", out)


def test_an_adapter_of_an_a_never_seen_is_decoded(many, embedded, private, tmp_path):
    assert list(json.loads((many / "fit.json").read_text())["decoders"]) == ["ridge"]
    assert files_under(many / "d") == ["any_a.safetensors", "decoders.json", "ridge.safetensors"]
    assert json.loads((many / "d" / "decoders.json").read_text())["kinds"] == ["ridge"]
    other = victim(embedded, tmp_path / "other", private.batch([1]), private.labels[1:2], seed=7)
    assert run(*decode(other, many, tmp_path)) == 0
    decoded, (target, update) = load_file(tmp_path / "gradients.safetensors"), attach(read_adapter(other), embedded)
    with Capture(target) as capture:
        true = capture(private.batch([1])[:, None], private.labels[1:2, None])
    for name in target.names:
        wanted, a = true.dense(name), update.a[name]
        assert cosine(decoded[name], wanted).item() > cosine(wanted @ torch.linalg.pinv(a) @ a, wanted).item() + 0.1


def test_what_many_a_cannot_serve_is_refused(many, stages, embedded, private, tmp_path, capsys):
    line = refused(capsys, "fit", many / "p", "--kind", "ridge", "conv", "--out", tmp_path / "o")
    assert "conv decodes one A only: choose ridge, kernel_ridge, mlp" in line
    wide = victim(embedded, tmp_path / "wide", private.batch([1]), private.labels[1:2], r=4)
    assert "of other layers, rank or alpha" in refused(capsys, *decode(wide, many, tmp_path / "o"))
    line = refused(capsys, "invert", stages.adapter, "--pairs", many / "p", "--out", tmp_path / "o")
    assert "has its own A: make pairs without --per-victim-a" in line
    long = ("--steps", 2, "--per-victim-a", "--count", 20, "--proxy", "embedded", "--out", tmp_path / "long")
    assert run("pairs", stages.adapter, *long) == 0
    assert "their gradients depend on A" in refused(capsys, "fit", tmp_path / "long", "--out", tmp_path / "o")
    assert not files_under(tmp_path / "o")


def test_pairs_of_many_a_from_stored_gradients(many, stages, tmp_path):
    words = ("pairs", stages.adapter, "--count", 40, "--cache", stages.pairs, "--per-victim-a", "--out", tmp_path / "p")
    assert run(*words) == 0
    got, expected = (load_file(folder / "p" / "pairs-00000.safetensors") for folder in (tmp_path, many))
    for name in [name for name in got if name.startswith("update/")]:
        a0 = name.replace("update", "a0")
        assert torch.equal(got[a0], expected[a0][:40]) and cosine(got[name], expected[name][:40]).min() > 0.9999


def test_the_log_shows_loss_and_held_out_cosine_of_every_layer(stages, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ("fit", stages.pairs, "--kind", "mlp", "--log-dir", tmp_path / "log", "--out", tmp_path / "d")
    assert run(*words) == 0
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    for name in json.loads((stages.pairs / "manifest.json").read_text())["layers"]:
        loss, angle = (events.Scalars(f"mlp/{name['name']}/{figure}") for figure in ("loss", "held_out_cosine"))
        assert loss[0].value > loss[-1].value and [event.step for event in loss] == list(range(len(loss)))
        assert len(angle) == len(loss) and all(-1 <= event.value <= 1 for event in angle)


def test_a_log_needs_its_package_and_a_kind_that_learns(stages, tmp_path, monkeypatch, capsys):
    words = ("fit", stages.pairs, "--log-dir", tmp_path / "log", "--out", tmp_path / "d")
    assert "name one with --kind (mlp, conv, unet)" in refused(capsys, *words)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = refused(capsys, *words, "--kind", "mlp")
    assert "needs the package tensorboard: pip install tensorboard" in line
    assert not (tmp_path / "log").exists() and not files_under(tmp_path / "d")


def test_precision_is_of_the_kinds_that_learn(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(MLP, "most_epochs", 3)
    figures = {}
    for precision in ("float32", "bfloat16"):
        words = ("fit", stages.pairs, "--kind", "row_lmmse", "mlp", "--precision", precision)
        assert run(*words, "--out", tmp_path / precision, "--json", tmp_path / "fit.json") == 0
        figures[precision] = json.loads((tmp_path / "fit.json").read_text())["decoders"]
    assert figures["float32"]["row_lmmse"] == figures["bfloat16"]["row_lmmse"]
    assert figures["float32"]["mlp"] != figures["bfloat16"]["mlp"]
    for name, layer in figures["float32"]["mlp"].items():
        assert layer["cosine_mean"] == pytest.approx(figures["bfloat16"]["mlp"][name]["cosine_mean"], abs=0.02)


def test_fit_wrote_every_kind(stages):
    record = json.loads((stages.decoders / "decoders.json").read_text())
    assert record["kinds"] == ["projection", "row_lmmse", "ridge"] and record["count"] == 32
    kinds = [f"{kind}.safetensors" for kind in ("projection", "ridge", "row_lmmse")]
    assert files_under(stages.decoders) == ["decoders.json", *kinds]


def test_fit_prints_what_it_says_in_json(stages, tmp_path, capsys):
    assert run("fit", stages.pairs, "--out", tmp_path / "d", "--json", tmp_path / "fit.json") == 0
    printed = json.loads((tmp_path / "fit.json").read_text())
    assert (printed["fitted"], printed["held_out"]) == (32, 8)
    shown = capsys.readouterr().out
    for kind in ("projection", "row_lmmse", "ridge"):
        figures = printed["decoders"][kind]["blocks.0.attn.qkv"]
        assert f"{figures['cosine_mean']:.3f} ({figures['cosine_p05']:.3f})" in shown

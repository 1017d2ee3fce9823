"""`r2f invert`: which routes run, and what is said of those that do not."""

import json
from dataclasses import replace

import pytest
import torch
from cli_cases import FIRST, files_under, refused, run
from safetensors.torch import load_file, save_file

from r2f_ext.inversion.routes import registry
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.models.draws import Trace
from r2f_ext.models.evidence import NO_BATCH, SHOWN


@pytest.fixture
def inverted(stages, tmp_path, capsys):
    """Runs the command on the session's pairs; returns what --json holds and what was printed."""

    def command(*options):
        words = ("invert", stages.adapter, "--pairs", stages.pairs, "--out", tmp_path / "o", *options)
        assert run(*words, "--json", tmp_path / "i.json") == 0
        return json.loads((tmp_path / "i.json").read_text()), capsys.readouterr().out

    return command


def test_named_routes_run_with_those_that_they_start_from(inverted):
    printed, _ = inverted("--routes", "amortised_refined")
    assert list(printed["routes"]) == ["amortised", "amortised_refined"] and printed["not_run"] == {}


def test_routes_that_do_not_run_say_why(inverted):
    printed, out = inverted("--routes", "amortised,matching,gauss_newton_unrolled")
    assert list(printed["routes"]) == ["amortised"]
    assert "decoded gradients" in printed["not_run"]["matching"]
    assert "recipe" in printed["not_run"]["gauss_newton_unrolled"] and "matching: Not run" in out


def test_decoded_gradients_add_the_route_matching(inverted, stages):
    printed, _ = inverted("--gradients", stages.gradients)
    assert set(printed["routes"]) == {"amortised", "amortised_refined", "matching"}
    assert set(printed["not_run"]) == {"adapter_rowspace", "attention_rowspace", "patch_position"}


def test_what_the_factors_show_is_said(inverted):
    printed, out = inverted("--routes", "amortised")
    assert printed["evidence"] == [SHOWN["default", Trace.NONE], NO_BATCH]
    assert all(sentence in " ".join(out.split()) for sentence in printed["evidence"])


def test_a_start_that_is_not_the_adapters_is_refused_before_pairs_are_read(stages, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("r2f_ext.audit.invert.StoredPairs", lambda *args: pytest.fail("pairs were read first"))
    words = ("invert", stages.adapter, "--pairs", stages.pairs, "--out", tmp_path / "o")
    assert "--a0-seed 7 does not draw the A" in refused(capsys, *words, "--a0-seed", 7)
    assert "has no adapter_model" in refused(capsys, *words, "--initial", tmp_path)
    assert not (tmp_path / "o").exists()


def test_bad_requests(stages, tmp_path, capsys, monkeypatch):
    words = ("invert", stages.adapter, "--pairs", stages.pairs, "--out", tmp_path / "o")
    assert "no route 'nonesuch': name some of" in refused(capsys, *words, "--routes", "nonesuch")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 1000})())
    assert "do not fit into" in refused(capsys, *words)


@pytest.mark.parametrize(("gradients", "inverter"), [(True, "ridge"), (False, "unet")])
def test_invert(stages, tmp_path, gradients, inverter):
    more = ("--inverter", inverter, *(("--gradients", stages.gradients) if gradients else ()))
    out = tmp_path / "i"
    code = run("invert", stages.adapter, "--pairs", stages.pairs, *more, "--out", out, "--json", tmp_path / "i.json")
    assert code == 0
    routes = ["amortised", "amortised_refined"] + ["matching"] * gradients
    assert list(json.loads((tmp_path / "i.json").read_text())["routes"]) == routes
    assert files_under(out) == sorted([f"{route}.png" for route in routes] + ["images.safetensors"])
    for images in load_file(out / "images.safetensors").values():
        assert images.shape == (1, 3, 32, 32) and images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize("damage", ["missing", "NaN", "two adapters", "text", "other layers"])
def test_bad_gradients(damage, stages, tmp_path, out, capsys, monkeypatch):
    monkeypatch.setattr("r2f_ext.audit.invert.run_routes", lambda *args: pytest.fail("time was spent first"))
    path = tmp_path / "g.safetensors"
    gradients = load_file(stages.gradients)
    if damage == "NaN":
        gradients[FIRST][0, 1, 2] = float("nan")
    elif damage == "two adapters":
        gradients = {name: torch.cat([g, g]) for name, g in gradients.items()}
    elif damage == "other layers":
        gradients = {"x": torch.zeros(1)}
    if damage == "text":
        path.write_text("x")
    elif damage != "missing":
        save_file(gradients, path)
    words = ("invert", stages.adapter, "--pairs", stages.pairs, "--gradients", path, "--out", out)
    assert str(path) in refused(capsys, *words)
    assert not files_under(out)


def test_the_search_for_the_exact_image(stages, tmp_path, monkeypatch, recwarn):
    """Two passes of the 22 that it may take."""
    route = type(registry()["gauss_newton"])
    whole, config = route.run, GaussNewtonConfig(passes=2)
    monkeypatch.setattr(
        route, "run", lambda self, problem, advance: whole(self, replace(problem, gauss_newton=config), advance)
    )
    out = tmp_path / "i"
    options = ("--pairs", stages.pairs, "--out", out, "--json", tmp_path / "i.json")
    assert run("invert", stages.adapter, "--gauss-newton", *options) == 0
    found = json.loads((tmp_path / "i.json").read_text())["routes"]["gauss_newton"]
    assert "of 1 images are exact" in found["why"] and found["per_victim"]["passes"] == [2]
    assert (out / "gauss_newton.png").is_file()
    assert [str(each.message) for each in recwarn] == []  # nothing of torch's or PEFT's inner workings

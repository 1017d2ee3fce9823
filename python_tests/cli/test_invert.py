"""`r2f invert`: which routes run, and what is said of those that do not."""

import json

import pytest
from cli_cases import few_steps, refused, run

from r2f_ext.cli import invert
from r2f_ext.models.draws import Trace
from r2f_ext.models.evidence import NO_BATCH, SHOWN


@pytest.fixture
def inverted(stages, tmp_path, monkeypatch, capsys):
    """Runs the command on the session's pairs; returns what --json holds and what was printed."""
    few_steps(monkeypatch)

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
    assert set(printed["not_run"]) == {"adapter_rowspace"}


def test_what_the_factors_show_is_said(inverted):
    printed, out = inverted("--routes", "amortised")
    assert printed["evidence"] == [SHOWN["default", Trace.NONE], NO_BATCH]
    assert all(sentence in " ".join(out.split()) for sentence in printed["evidence"])


def test_a_start_that_is_not_the_adapters_is_refused_before_pairs_are_read(stages, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(invert, "StoredPairs", lambda *args: pytest.fail("pairs were read first"))
    words = ("invert", stages.adapter, "--pairs", stages.pairs, "--out", tmp_path / "o")
    assert "--a0-seed 7 does not draw the A" in refused(capsys, *words, "--a0-seed", 7)
    assert "has no adapter_model" in refused(capsys, *words, "--initial", tmp_path)
    assert not (tmp_path / "o").exists()


def test_bad_requests(stages, tmp_path, capsys, monkeypatch):
    words = ("invert", stages.adapter, "--pairs", stages.pairs, "--out", tmp_path / "o")
    assert "no route 'nonesuch': name some of" in refused(capsys, *words, "--routes", "nonesuch")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 1000})())
    assert "do not fit into" in refused(capsys, *words)

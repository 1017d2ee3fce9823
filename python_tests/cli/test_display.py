"""The terminal: the verdict first, names as they are, bars on a terminal, whole lines on a pipe."""

import errno
import importlib
import io
from dataclasses import replace

import pytest
from cli_cases import commands_with_out, run
from page_cases import closed_forms, report, victims
from rich.console import Console

from r2f_ext.audit.schema import TargetFigures
from r2f_ext.cli import display
from r2f_ext.progress import Stages
from r2f_ext.types import AdaptedLayer


@pytest.fixture
def screen(monkeypatch):
    """A console that writes into a string; screen(terminal) makes it."""

    def make(terminal=False, width=None):
        file = io.StringIO()
        width = width or (120 if terminal else display.PIPE_WIDTH)
        options = {"highlight": False, "soft_wrap": True, "width": width}
        monkeypatch.setattr(display, "console", Console(file=file, force_terminal=terminal, **options))
        return file

    return make


def target(base="b", scales=(12.5, 1.0)):
    layers = [AdaptedLayer("l", 4, 4, 8 + 8 * i, scale) for i, scale in enumerate(scales)]
    return TargetFigures(base, 16, layers, 65, {}, {})


def test_markup_in_names_is_text(screen):
    file = screen()
    display.table("title [/b] [red]", ["layer", "x"], [["[bold]name[/wrong]", "1"], ["control: mean", "2"]])
    display.print_target(target(base="[/x]", scales=(2.0,)), "one")
    shown = file.getvalue()
    assert "title [/b] [red]" in shown and "[bold]name[/wrong]" in shown
    assert "base [/x], 1 adapted layer, rank 8, scale 2, 65 tokens" in shown


def test_ranks_and_scales_that_differ_are_all_said(screen):
    file = screen()
    display.print_target(target(), "one")
    assert "2 adapted layers, ranks 8-16, scales 1-12.5," in file.getvalue()


def test_a_pipe_gets_one_line_a_stage(screen):
    file = screen()
    with display.drawn_stages() as stages:
        with stages.stage("pairs", 30) as advance:
            advance(30)
        with stages.stage("fit"):
            pass
    lines = file.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["pairs", "fit"] and lines[0].endswith("/s")
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_what_came_of_a_unit_is_told_on_a_line_of_its_own(terminal, screen):
    file = screen(terminal)
    with display.drawn_stages() as stages, stages.stage("gauss_newton", 2) as advance:
        advance(0, "kept in [/b]")
        advance(1, "search 1 of 2: residual 2.0e-06, exact to 58 dB; 1 exact so far")
        advance(1)
    lines = file.getvalue().splitlines()
    told = [line for line in lines if "search 1 of 2" in line]
    assert any("gauss_newton: kept in [/b]" in line for line in lines)
    assert len(told) == 1 and "gauss_newton: search 1 of 2: residual 2.0e-06, exact to 58 dB" in told[0]
    if not terminal:
        assert [line.split(":")[1][:9] for line in lines] == [" kept in ", " search 1", lines[2].split(":")[1][:9]]


def test_a_pipe_gets_each_row_on_one_line_whatever_its_length(screen):
    file = screen()
    name, why = "blocks.11.attn." + "long_" * 40, "A reason of many words. " * 30
    display.table("t", ["layer", "why"], [[name, why]])
    display.print_verdicts([(name, True, why)])
    lines = [line for line in file.getvalue().splitlines() if name in line]
    assert len(lines) == 2 and all(line.endswith(why.strip()) for line in lines) and "\x1b" not in file.getvalue()
    assert not [line for line in file.getvalue().splitlines() if line != line.rstrip()]


def test_the_console_of_a_pipe_is_wide_and_that_of_a_terminal_is_not():
    assert display.console_for(terminal=False).width == display.PIPE_WIDTH
    assert display.console_for(terminal=True).width < display.PIPE_WIDTH


def test_a_terminal_gets_bars(screen):
    file = screen(terminal=True)
    with display.drawn_stages() as stages, stages.stage("pairs", 30) as advance:
        advance(30)
    assert "pairs" in file.getvalue() and "30/30" in file.getvalue()


def test_a_failed_stage_leaves_the_terminal_usable(screen):
    file = screen(terminal=True)
    with pytest.raises(KeyboardInterrupt), display.drawn_stages() as stages, stages.stage("pairs", 30):
        raise KeyboardInterrupt
    assert file.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_report_begins_with_the_verdict_in_bold(screen):
    file = screen(terminal=True)
    figures = report([victims(3)])
    figures.verdict.sentences[0] = "It leaks [/b]."
    display.print_report(figures)
    assert file.getvalue().startswith("\x1b[1mIt leaks [/b].\x1b[0m\n") and "(0.4 to 2.2)" in file.getvalue()


def test_scores_controls_and_sentences_are_shown(screen):
    file = screen()
    sets = [victims(3, name="clothes"), victims(4, name="faces [/b]", exact=False)]
    display.print_report(report(sets, closed_forms(sets[0][0])))
    shown = file.getvalue()
    for words in (
        "clothes: 3 adapters, proxy procedural",
        "control: other adapter",
        "control: mean image",
        "+1.3 (+0.4 to +2.2)",
        "23.40",
        "50%",
        "gauss_newton: 2 of 3 exact: victim 1 exact to 78 dB, victim 2 exact to 78 dB. Why gauss_newton.",
        "paired by assignment",
        "far from every proxy update",
        "adapter-0: optimizer.pt lies beside it.",
        "A sentence on the run.",
        "faces [/b]: The adapter gave away 1.3 dB.",
        "3,000 pairs",
        "class mean",
        "0.760",
        "no proof of safety",
        "not tried: matching: It was not asked for.",
    ):
        assert words in shown
    assert "1 adapters" not in shown


def test_an_unscored_report_has_no_table_of_scores_and_says_what_is_exact(screen):
    file = screen()
    display.print_report(report([victims(1, private=False)]))
    shown = file.getvalue()
    assert "SSIM" not in shown and "not scored" not in shown and "without private images there is no PSNR" in shown
    assert "gauss_newton: exact to 78 dB. Why gauss_newton." in shown and "1 adapter," in shown


def test_figures_that_are_missing_are_left_out(screen):
    file = screen()
    whole = report([victims(2)])
    for kinds in whole.proxies["procedural"].decoders.values():
        for kind, figures in kinds.items():
            kinds[kind] = replace(figures, victim_true=None, victim_estimate=None)
    intervals = whole.reconstruction["my-adapter"].control_intervals
    intervals["shuffled_adapter"] = replace(intervals["shuffled_adapter"], interval_db=None)
    display.print_report(whole)
    shown = file.getvalue()
    assert "private images" not in shown.split("Decoders")[1] and "estimate" not in shown and "floor" in shown
    assert "+1.3\n" in shown.replace(" ", "")


def test_stages_survive_without_a_listener():
    stages = Stages()
    with stages.stage("a") as advance:
        advance(1)
    assert set(stages.seconds) == {"a"}


STAGES = {
    "audit": ("matching", "r2f_ext.inversion.routes.matching.match"),
    "pairs": ("pairs", "r2f_ext.pairs.shards.sha256"),
    "fit": ("fit", "r2f_ext.decoders.ridge.gram"),
    "invert": ("amortised_refined", "r2f_ext.inversion.routes.amortised_refined.match"),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_stops_is_not_shown_as_finished(name, error, stages, out, capsys, monkeypatch):
    stage, place = STAGES[name]
    importlib.import_module(place.rpartition(".")[0])

    def stop(*args, **options):
        raise error

    monkeypatch.setattr(place, stop)
    words = [str(word) for word in (*commands_with_out(stages)[name], "--out", out)]
    assert run(*words) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.split(":")[0].split()[-1:] == [stage]]
    assert len(lines) == 1 and "stopped after" in lines[0] and "/s" not in lines[0]

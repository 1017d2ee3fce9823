"""The terminal: names as they are, bars on a terminal, lines on a pipe."""

import io

import pytest
from rich.console import Console

from r2f_ext.cli import display
from r2f_ext.progress import Stages


@pytest.fixture
def screen(monkeypatch):
    """A console that writes into a string; screen(terminal) makes it."""

    def make(terminal=False):
        file = io.StringIO()
        options = {"highlight": False, "soft_wrap": True, "width": 120}
        monkeypatch.setattr(display, "console", Console(file=file, force_terminal=terminal, **options))
        return file

    return make


def test_markup_in_names_is_text(screen):
    file = screen()
    display.table("title [/b] [red]", ["layer", "x"], [["[bold]name[/wrong]", "1"], ["control: mean", "2"]])
    target = {"base": "[/x]", "layers": [{"scale": 2.0}], "rank": 8, "tokens": 65, "steps": "one", "identifiable": {}}
    display.print_target(target)
    shown = file.getvalue()
    assert "title [/b] [red]" in shown and "[bold]name[/wrong]" in shown and "base [/x], 1 adapted layers" in shown


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


def test_controls_are_marked_and_unscored_routes_said(screen):
    file = screen()
    figures = {"cosine_mean": 0.5, "cosine_p05": 0.25}
    route = {"psnr_db_mean": None, "psnr_db_std": None, "ssim_mean": None, "label_accuracy": None}
    scored = {"psnr_db_mean": 12.345, "psnr_db_std": 1.0, "ssim_mean": 0.5, "label_accuracy": 0.75}
    part = {"n": 2, "proxy": "p", "routes": {"matching": route, "amortised": scored}, "controls": {"mean_image": 9.0}}
    display.print_report(
        {
            "phase0": [],
            "proxies": {"p": {"decoders": {"l": {"ridge": figures}}, "pairs": {"count": 1200, "per_second": 10.0}}},
            "reconstruction": {"set": {**part, "verdict": "It leaks [/b].", "notes": ["Beware."]}},
            "notes": ["Refused [/b]."],
        }
    )
    shown = file.getvalue()
    for words in (
        "not scored",
        "12.35",
        "75%",
        "control: mean image",
        "It leaks [/b].",
        "Beware.",
        "Refused [/b].",
        "1,200 pairs",
    ):
        assert words in shown
    assert "0.500" in shown and "0.250" in shown


def test_stages_survive_without_a_listener():
    stages = Stages()
    with stages.stage("a") as advance:
        advance(1)
    assert set(stages.seconds) == {"a"}

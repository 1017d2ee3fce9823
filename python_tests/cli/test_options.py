"""The options of every command, and what argparse refuses by itself."""

import pytest

import r2f_ext
from r2f_ext.cli import commands, main
from r2f_ext.cli.options import DESCRIPTION, EXAMPLES, parse


def test_every_command_of_the_help_exists(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and all(name in shown for name in commands.COMMANDS)
    assert DESCRIPTION.splitlines()[0] in shown


@pytest.mark.parametrize("line", [line for line in EXAMPLES.splitlines() if line.startswith("  r2f ")])
def test_every_example_parses(line):
    words = line.split("  ")[1].split()
    assert words[0] == "r2f" and parse(words[1:]).command in commands.COMMANDS


@pytest.mark.parametrize("command", list(commands.COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        parse([command, "--help"])
    assert caught.value.code == 0 and "--json" in capsys.readouterr().out


def test_defaults():
    audit = parse(["audit", "a", "b", "--out", "o"])
    assert (audit.adapter, audit.base, audit.proxy, audit.private) == (["a", "b"], "embedded", "procedural", None)
    assert (audit.count, audit.seed, audit.device, audit.json) == (8000, 0, "auto", None)
    assert audit.budget is None and parse(["audit", "a", "--out", "o", "--budget", "0.5"]).budget == 0.5
    assert parse(["invert", "a", "--pairs", "p", "--out", "o"]).budget is None
    assert audit.precision == parse(["pairs", "a", "--out", "o"]).precision == "float32"
    assert parse(["decode", "a", "--pairs", "p", "--decoders", "d", "--out", "o"]).kind == "ridge"


@pytest.mark.parametrize(
    "words",
    [
        ["steal"],
        ["audit"],
        ["audit", "a"],
        ["pairs", "a", "b", "--out", "o"],
        ["pairs", "a", "--out", "o", "--count", "many"],
        ["pairs", "a", "--out", "o", "--precision", "float16"],
        ["pairs", "a", "--out", "o", "--optimizer", "lion"],
        ["decode", "a", "--pairs", "p", "--decoders", "d", "--kind", "magic", "--out", "o"],
        ["demo", "--out", "o", "--device", "tpu"],
        ["audit", "--replay"],
        ["audit", "a", "--replay", "report.json"],
        ["audit", "--replay", "report.json", "--seed", "1"],
        ["audit", "--replay", "report.json", "--gauss-newton"],
    ],
)
def test_wrong_words_end_with_two(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and "r2f" in capsys.readouterr().err


def test_a_replay_may_go_elsewhere():
    words = parse(["audit", "--replay", "report.json", "--out", "o", "--device", "cpu", "--json", "j", "--debug"])
    assert (words.replay, words.out, words.adapter) == ("report.json", "o", [])


def test_no_command_prints_the_help_and_version_prints_the_version(capsys):
    for words, shown in (([], DESCRIPTION.splitlines()[0]), (["--version"], f"r2f-ext {r2f_ext.__version__}")):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0 and shown in capsys.readouterr().out

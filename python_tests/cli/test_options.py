"""What can be asked, and what argparse refuses by itself."""

import subprocess
import sys
from pathlib import Path

import pytest

import r2f_ext
from r2f_ext import decoders
from r2f_ext.cli import commands, main, options
from r2f_ext.cli.options import DESCRIPTION, EXAMPLES, parse

REPOSITORY = Path(r2f_ext.__file__).parent.parent


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
    assert audit.precision == parse(["pairs", "a", "--out", "o"]).precision == "float32"
    assert parse(["decode", "a", "--pairs", "p", "--decoders", "d", "--out", "o"]).kind == "ridge"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["steal"],
        ["audit"],
        ["audit", "a"],
        ["pairs", "a", "b", "--out", "o"],
        ["pairs", "a", "--out", "o", "--count", "many"],
        ["pairs", "a", "--out", "o", "--precision", "float16"],
        ["pairs", "a", "--out", "o", "--optimizer", "lion"],
        ["decode", "a", "--pairs", "p", "--decoders", "d", "--kind", "magic", "--out", "o"],
        ["demo", "--out", "o", "--device", "tpu"],
    ],
)
def test_wrong_words_end_with_two(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and "r2f" in capsys.readouterr().err


def test_help_answers_without_torch():
    code = (
        "import sys\nfrom r2f_ext.cli.options import parse\ntry:\n parse(['audit', '-h'])\nexcept SystemExit:\n pass\n"
    )
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, timeout=60)
    assert done.returncode == 0 and b"ADAPTER" in done.stdout


def test_the_kinds_are_those_of_the_library():
    assert tuple(decoders.KINDS) == options.KINDS and options.KINDS[:3] == decoders.DEFAULT_KINDS

"""What is refused before torch is loaded, and that the checks agree with the library."""

import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import files_under, refused

import r2f_ext
from r2f_ext import decoders
from r2f_ext.audit.run import MIN_PAIRS
from r2f_ext.cli import options
from r2f_ext.cli.checks import MIN_AUDIT_PAIRS
from r2f_ext.data import load_images
from r2f_ext.data.load import LOADERS
from r2f_ext.inversion.routes import registry
from r2f_ext.models import base

REPOSITORY = Path(__file__).resolve().parents[2]


# Loading torch takes seconds; these take tenths of one.
@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (["audit", "-h"], 0, "ADAPTER"),
        (["--version"], 0, r2f_ext.__version__),
        (["audit", "none", "--out", "o", "--count", "5"], 2, "at least 40, got 5"),
        (["demo", "--out", "o", "--seed", "-1"], 2, "at least 0, got -1"),
        (["demo", "--out", "o", "--base", "timm:x"], 2, "leave --base out"),
        (["phase0", "--out", "o", "--base", "none"], 2, "unknown base 'none'"),
        (["phase0", "--out", "o", "--images", "none"], 2, "unknown images 'none'"),
        (["pairs", "none", "--out", "o"], 2, "'none' does not exist"),
        (["pairs", "setup.py", "--out", "o"], 2, "'setup.py' is a file, not a folder"),
        (["audit", "docs", "--out", "o", "--private", "none"], 2, "unknown images 'none'"),
        (["audit", "docs", "--out", "o", "--private", "none:3"], 2, "unknown images 'none'"),
        (["audit", "docs", "--out", "o", "--private", "embedded+none"], 2, "unknown images 'none'"),
        (["audit", "docs", "--out", "o", "--private", "embedded:"], 2, "unknown images 'embedded:'"),
        (["audit", "docs", "--out", "o", "--private", "embedded:100"], 2, "'embedded' has 100 images, counted from 0"),
        (["audit", "docs", "--out", "o", "--private", "lfw:3,100"], 2, "'lfw' has 100 images, counted from 0"),
        (["audit", "docs", "--out", "o", "--private", "lfw:3,,4"], 2, "write the indices like lfw:3 or lfw:3,7"),
        (["audit", "docs", "--out", "o", "--routes", "matching,magic"], 2, "there is no route 'magic'"),
        (["audit", "docs", "--out", "o", "--routes", ","], 2, "--routes names no route"),
        (["audit", "docs", "--out", "o", "--initial", "none"], 2, "--initial 'none' is not a folder"),
        (["audit", "docs", "--out", "o", "--initial", "docs"], 2, "has no adapter_model.safetensors"),
        (["audit", "docs", "--out", "o", "--seed", str(2**63)], 2, "--seed must be at most"),
        (["audit", "docs", "--out", "o", "--a0-seed", "-1"], 2, "--a0-seed must be at least 0"),
        (["audit", "docs", "--out", "o", "--base", "setup.py"], 2, "It is a file: pass the folder that holds it"),
        (["audit", "docs", "--out", "o", "--base", "timm-random:"], 2, "name a model after 'timm-random:'"),
        (["audit", "docs", "--out", "o", "--precision", "float16"], 2, "invalid choice: 'float16'"),
        (["audit", "docs", "--out", "o" * 300], 2, "File name too long"),
        (["audit", "--replay", "none"], 2, "'none' cannot be read (No such file or directory)"),
        (["audit", "--replay", "docs"], 2, "'docs' cannot be read (Is a directory)"),
        (["audit", "--replay", "README.md"], 2, "'README.md' is not JSON"),
        (["audit", "--replay", "benchmarks/results/0.1.0/identifiability.json"], 2, "is not a report"),
        (["decode", "docs", "--pairs", "none", "--decoders", "docs", "--out", "o"], 2, "no finished pairs"),
        (["identifiability", "--image-size", "0"], 2, "--image-size must be at least 1"),
        (["fit", "none", "--out", "o"], 2, "no finished pairs"),
        (["demo", "--out", "setup.py/o"], 2, "choose another folder"),
        (["env", "--json", "r2f_ext"], 2, "is a folder"),
    ],
)
def test_help_and_refusals_of_arguments_do_not_load_torch(words, code, shown):
    program = f"""
import sys
from r2f_ext.cli import main
try:
    code = main({words})
except SystemExit as done:
    code = done.code
sys.exit(99 if "torch" in sys.modules or "numpy" in sys.modules else code)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=60, text=True)
    assert done.returncode == code and shown in done.stdout + done.stderr


def test_the_names_are_those_of_the_library():
    assert tuple(LOADERS) == options.IMAGES and MIN_AUDIT_PAIRS == MIN_PAIRS
    assert tuple(decoders.KINDS) == options.KINDS and options.KINDS[:3] == decoders.DEFAULT_KINDS
    assert options.BASES == base.KINDS and tuple(sorted(registry())) == options.ROUTES
    assert tuple(options.PRIVATE_IMAGES) == options.IMAGES


@pytest.mark.parametrize("name", ["embedded", "lfw", "photos", "procedural"])
def test_the_private_images_are_as_many_as_the_check_says(name):
    assert len(load_images(name, role="private")) == options.PRIVATE_IMAGES[name]


def test_demo_has_its_own_base(out, capsys):
    assert "leave --base out" in refused(capsys, "demo", "--base", "timm:vit_tiny_patch16_224", "--out", out)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--proxy", "nothing"), "unknown images 'nothing'"),
        (("--count", 0), "at least 40, got 0"),
        (("--count", -5), "at least 40, got -5"),
        (("--seed", -1), "--seed must be at least 0"),
        (("--budget", 0), "--budget must be minutes above 0, got 0."),
        (("--budget", "nan"), "--budget must be minutes above 0, got nan."),
        (("--count", 39), "at least 40"),
        (("--private", "embedded:999"), "has 100 images, counted from 0"),
        (("--private", "no-such-folder"), "unknown images"),
        (("--private", "embedded:3,100"), "has 100 images, counted from 0"),
        (("--seed", 2**63), "--seed must be at most"),
    ],
)
def test_bad_numbers_and_names(words, sentence, adapter_folder, out, capsys):
    defaults = ("--proxy", "embedded", "--count", 60)
    assert sentence in refused(capsys, "audit", adapter_folder, *defaults, *words, "--out", out)
    assert not files_under(out)

"""Recorded inputs hold no absolute path and lead back to the same files from the report's folder."""

import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from r2f_ext.audit.record import Inputs, command_of, public_name
from r2f_ext.cli.options import parse
from r2f_ext.config import AuditConfig
from r2f_ext.inversion.task import GaussNewtonConfig


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current directory, with the folders a, b+c, embedded and reports/r."""
    for name in ("a", "b+c", "embedded", "reports/r"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def inputs(**changed):
    plain = {"base": "embedded", "proxy": "procedural", "private": None, "initial": None, "a0_seed": 3, "device": "cpu"}
    return Inputs(**{"adapters": ("a",), **plain, **changed})


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ({"adapters": ("a", "embedded")}, {"adapters": ("../../a", "../../embedded")}),
        ({"base": "a"}, {"base": "../../a"}),
        ({"base": "timm:a"}, {"base": "timm:a"}),
        ({"proxy": "embedded"}, {"proxy": "embedded"}),  # the name wins over the folder, as in load_images
        ({"proxy": "b+c"}, {"proxy": "../../b+c"}),
        ({"proxy": "a+procedural+embedded"}, {"proxy": "../../a+procedural+embedded"}),
        ({"private": "embedded:3"}, {"private": "embedded:3"}),
        ({"private": "a:3"}, {"private": "../../a:3"}),
        ({"private": "a"}, {"private": "../../a"}),
        ({"initial": "reports"}, {"initial": ".."}),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_paths_become_relative_and_come_back(given, recorded, absolute, place):
    if absolute:
        given = {
            name: tuple(map(str, map(Path.absolute, map(Path, value)))) if name == "adapters" else value
            for name, value in given.items()
        }
    folder = Path("reports/r")
    relative = inputs(**given).relative_to(folder)
    adapters = {"adapters": ("../../a",)}
    assert relative == inputs(**{**adapters, **recorded})
    resolved = relative.resolved(folder)
    assert resolved.relative_to(folder) == relative
    assert all(Path(path).is_dir() for path in resolved.adapters)


def test_a_folder_inside_the_reports_is_told_from_a_name(place):
    (place / "reports" / "r" / "embedded").mkdir()
    relative = inputs(adapters=("reports/r/embedded",)).relative_to(Path("reports/r"))
    assert relative.adapters == ("./embedded",)
    assert relative.resolved(Path("reports/r")).adapters == (str(place / "reports/r/embedded"),)


def test_reports_name_folders_by_their_last_part(place):
    assert public_name(str(place / "a")) == "a" and public_name(f"{place}/a+embedded") == "a+embedded"
    assert public_name("procedural") == "procedural" and public_name("timm:vit") == "timm:vit"


def test_the_recorded_command_is_read_back_as_the_same_audit():
    given = inputs(adapters=("../a b", "./c"), private="embedded:3,4", initial="../start", proxy="../x+embedded")
    routes = ("amortised", "matching")
    config = AuditConfig(
        pairs=300, routes=routes, gauss_newton=True, search=GaussNewtonConfig(minutes=1.5), precision="bfloat16", seed=4
    )
    program, *words = shlex.split(command_of(given, config))
    options = parse(words)
    assert program == "r2f" and options.command == "audit" and options.out == "."
    assert tuple(options.adapter) == given.adapters and options.a0_seed == 3
    for name in ("base", "proxy", "private", "initial", "device"):
        assert getattr(options, name) == getattr(given, name)
    assert (options.count, options.routes, options.seed, options.budget) == (300, routes, 4, 1.5)
    assert options.gauss_newton and options.precision == "bfloat16"
    # One seed stands for all: also for the search of a config that was made in Python.
    assert config.search == GaussNewtonConfig(minutes=1.5, seed=4)
    assert replace(config, seed=5).search.seed == 5 and AuditConfig.from_json(asdict(config)) == config
    plain = parse(shlex.split(command_of(inputs(), AuditConfig()))[1:])
    assert plain.routes is None and not plain.gauss_newton and plain.private is None and plain.budget is None

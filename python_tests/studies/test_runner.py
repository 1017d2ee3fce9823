"""The runner of studies: what it measures, keeps, finds again, refuses, and writes."""

import json

import pytest
from study_cases import Squares

from r2f_ext.errors import R2FError
from r2f_ext.studies import Data, World, run_study
from r2f_ext.studies.runner import command_of


def test_every_setting_is_measured_for_every_seed(tmp_path):
    study = Squares()
    result = run_study(study, World(), tmp_path)
    assert study.calls == [(x, seed) for seed in (0, 1) for x in (1, 2, 4)]
    assert result.table.one("square", x=4).values == (16.0, 16.0, 16.0, 17.0)
    assert result.sentences() == ["Two squared is 4.2 (4.0 to 4.8; n = 4)."]
    assert {path.name for path in (tmp_path / "squares").iterdir()} == {
        "record.json",
        "table.csv",
        "figure.png",
        "page.md",
    }


def test_a_second_run_measures_nothing_and_writes_the_same(tmp_path):
    run_study(Squares(), World(), tmp_path)
    first = {path.name: path.read_bytes() for path in (tmp_path / "squares").iterdir()}
    again = Squares()
    run_study(again, World(), tmp_path)
    assert again.calls == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "squares").iterdir()} == first


def test_an_interrupted_run_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_study(Squares(broken=[4], error=KeyboardInterrupt()), World(), tmp_path)
    study = Squares()
    run_study(study, World(), tmp_path)
    assert study.calls == [(4, 0), (1, 1), (2, 1), (4, 1)]


def test_more_seeds_are_added(tmp_path):
    run_study(Squares(), World(), tmp_path, seeds=[0])
    study = Squares()
    result = run_study(study, World(), tmp_path, seeds=[0, 7])
    assert {seed for _, seed in study.calls} == {7}
    assert result.table.one("square", x=1).n == 4
    assert run_study(Squares(), World(), tmp_path, seeds=[7]).table.one("square", x=1).n == 2


def test_a_quick_run_is_of_one_seed_and_says_what_it_is(tmp_path):
    result = run_study(Squares(), World(quick=True), tmp_path)
    assert result.seeds == (0,)
    assert result.sentences()[0].startswith("A quick run")


def test_other_options_are_refused(tmp_path):
    run_study(Squares(), World(quick=True), tmp_path)
    with pytest.raises(R2FError, match=r"other options.*choose another --out"):
        run_study(Squares(), World(), tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "study": "squares", "options": {}, "cells": [{}]}'])
def test_a_damaged_record_is_refused_by_name(tmp_path, text):
    (tmp_path / "squares").mkdir()
    (tmp_path / "squares" / "record.json").write_text(text)
    with pytest.raises(R2FError, match=r"record\.json' is .*delete it"):
        run_study(Squares(), World(), tmp_path)


def test_a_cell_that_fails_is_left_out_said_and_tried_again(tmp_path):
    result = run_study(Squares(broken=[1]), World(), tmp_path, seeds=[0])
    assert result.failed == {"x 1, seed 0": "the number is odd: use even ones."}
    assert "Not measured: x 1, seed 0: the number is odd: use even ones." in result.sentences()
    assert "Not measured" in (tmp_path / "squares" / "page.md").read_text()
    again = Squares()
    assert run_study(again, World(), tmp_path, seeds=[0]).failed == {}
    assert again.calls == [(1, 0)]


def test_a_bug_is_raised(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run_study(Squares(broken=[2], error=ZeroDivisionError()), World(), tmp_path)


def test_where_nothing_can_be_measured_the_reason_is_raised(tmp_path):
    with pytest.raises(R2FError, match="'squares' could not be run: the number is odd"):
        run_study(Squares(broken=[1, 2, 4]), World(), tmp_path)
    with pytest.raises(R2FError, match="at least one seed"):
        run_study(Squares(), World(), tmp_path, seeds=[])


def test_the_command_repeats_the_run_and_hides_folders(tmp_path):
    own = World(base="embedded", data=(Data("mine", str(tmp_path), "lfw+procedural"),), quick=True)
    said = command_of(Squares(), own, (3, 4))
    name = tmp_path.name
    assert said == f"r2f study squares --quick --private {name} --proxy lfw+procedural --seeds 2 --seed 3 --out DIR"
    assert command_of(Squares(), World(), (0, 1)) == "r2f study squares --out DIR"


def test_the_record_holds_no_path(tmp_path):
    own = World(data=(Data("mine", str(tmp_path), "embedded"),))
    run_study(Squares(), own, tmp_path / "out")
    record = (tmp_path / "out" / "squares" / "record.json").read_text()
    assert str(tmp_path) not in record
    assert json.loads(record)["options"]["data"] == [{"name": "mine", "private": tmp_path.name, "proxy": "embedded"}]

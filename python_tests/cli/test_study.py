"""`r2f study`: what it prints and writes, and what it refuses."""

import json

import pytest
from study_cases import Squares

from r2f_ext.cli import main
from r2f_ext.studies import questions


class Cubes(Squares):
    name = "cubes"
    question = "How fast do cubes grow?"


@pytest.fixture
def offered(monkeypatch):
    """Replaces the studies by those of a test, under names that the parser knows."""

    def offer(**studies):
        monkeypatch.setattr(questions, "registry", lambda: studies)

    return offer


def test_one_study_says_what_it_found_and_where(tmp_path, capsys, offered):
    offered(rank=Squares())
    out, data = tmp_path / "out", tmp_path / "said.json"
    assert main(["study", "rank", "--quick", "--out", str(out), "--json", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "How fast do squares grow?" in printed and "Two squared is" in printed and str(out / "squares") in printed
    said = json.loads(data.read_text())["squares"]
    assert said["failed"] == {} and said["sentences"][-1].startswith("Two squared")
    assert not (out / "studies.html").exists()


def test_all_writes_one_page(tmp_path, offered):
    offered(rank=Squares(), steps=Cubes())
    assert main(["study", "all", "--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "studies.html").read_text()
    assert "How fast do squares grow?" in page and "How fast do cubes grow?" in page


def test_seeds_begin_at_seed(tmp_path, offered):
    study = Squares()
    offered(rank=study)
    assert main(["study", "rank", "--quick", "--seed", "5", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert {seed for _, seed in study.calls} == {5, 6}


def test_a_cell_that_fails_gives_exit_code_3(tmp_path, capsys, offered):
    offered(rank=Squares(broken=[1]))
    assert main(["study", "rank", "--quick", "--out", str(tmp_path)]) == 3
    assert "x 1, seed 0 could not be measured" in capsys.readouterr().err


def test_a_study_that_fails_does_not_end_the_others(tmp_path, capsys, offered):
    offered(rank=Squares(broken=[1, 2]), steps=Cubes())
    assert main(["study", "all", "--quick", "--out", str(tmp_path)]) == 3
    said = capsys.readouterr()
    assert "the number is odd" in said.err and "How fast do cubes grow?" in said.out
    offered(rank=Squares(broken=[1, 2]))
    assert main(["study", "rank", "--quick", "--out", str(tmp_path / "alone")]) == 2


def test_own_images_replace_the_protocols(tmp_path, offered):
    class Named(Squares):
        def settings(self, world):
            self.seen = [(data.name, data.private, data.proxy) for data in world.data]
            return super().settings(world)

    study = Named()
    offered(rank=study)
    own = ["--private", "lfw", "--proxy", "procedural+embedded"]
    assert main(["study", "rank", "--quick", *own, "--out", str(tmp_path)]) == 0
    assert study.seen == [("lfw", "lfw", "procedural+embedded")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["study", "nothing", "--out", "x"], "invalid choice: 'nothing'"),
        (["study", "rank", "--private", "lfw", "--out", "x"], "--private and --proxy together"),
        (["study", "rank", "--proxy", "lfw", "--out", "x"], "--private and --proxy together"),
    ],
)
def test_what_the_parser_refuses(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--private", "lfw:3", "--proxy", "lfw"], "unknown images 'lfw:3'"),
        (["--private", "lfw", "--proxy", "no-such-folder"], "unknown images 'no-such-folder'"),
        (["--base", "no-such-base"], "unknown base 'no-such-base'"),
    ],
)
def test_what_the_checks_refuse(tmp_path, capsys, arguments, sentence):
    assert main(["study", "rank", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_study_says_that_it_goes_on_and_does(tmp_path, capsys, offered, monkeypatch):
    study, whole = Squares(), Squares.measure
    offered(rank=study)

    def stopped(self, *given):
        if self.calls:
            raise KeyboardInterrupt
        return whole(self, *given)

    monkeypatch.setattr(Squares, "measure", stopped)
    command = ["study", "rank", "--quick", "--out", str(tmp_path)]
    assert main(command) == 130 and len(study.calls) == 1
    assert "the same command goes on from what is finished" in capsys.readouterr().err
    monkeypatch.setattr(Squares, "measure", whole)
    assert main(command) == 0 and len(study.calls) == len(set(map(str, study.calls))) > 1

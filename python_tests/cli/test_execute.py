"""What every command does beside its own work: --json, and only the first of several processes speaks."""

import json
from contextlib import contextmanager

import pytest
from cli_cases import pairs_of, refused, run

from r2f_ext.cli import display, execute


def test_json_that_cannot_be_written(stages, tmp_path, out, capsys):
    (tmp_path / "file").write_text("mine")
    line = refused(capsys, *pairs_of(stages.adapter, out), "--json", tmp_path / "file" / "x.json")
    assert "cannot write" in line
    assert "is a folder" in refused(capsys, *pairs_of(stages.adapter, out), "--json", tmp_path)
    assert not out.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_prints_and_writes_json(rank, tmp_path, capsys, monkeypatch):
    @contextmanager
    def processes(cuda):
        yield

    def command(options):
        display.console.print("said")
        return {"a": 1}

    monkeypatch.setattr(execute.distributed, "processes", processes)
    monkeypatch.setattr(execute.distributed, "rank", lambda: rank)
    monkeypatch.setattr(display.console, "quiet", False)
    monkeypatch.setattr(
        execute.commands, "load", lambda name: lambda options: display.console.print("said") or {"a": 1}
    )
    path = tmp_path / "new" / "out.json"
    assert run("env", "--json", path) == 0
    assert path.exists() == (rank == 0) and ("said" in capsys.readouterr().out) == (rank == 0)
    assert rank or json.loads(path.read_text()) == {"a": 1}

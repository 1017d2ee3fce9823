"""`r2f env`."""

import json

import torch
from cli_cases import run


def test_env(capsys, tmp_path):
    assert run("env", "--json", tmp_path / "deep" / "env.json") == 0
    written = json.loads((tmp_path / "deep" / "env.json").read_text())
    assert json.loads(capsys.readouterr().out) == written
    assert written["versions"]["torch"] == torch.__version__

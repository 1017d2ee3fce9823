"""Commands of few matching steps and simulated controls, and where they write."""

import pytest
from cli_cases import few_steps


@pytest.fixture(autouse=True)
def _few_steps(few_controls, monkeypatch):
    few_steps(monkeypatch)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"

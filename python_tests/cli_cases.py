"""The command line run in-process, with toy numbers of matching steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from r2f_ext.cli import commands, invert, main
from r2f_ext.config import AuditConfig
from r2f_ext.inversion.matching import MatchingConfig


def few_steps(patch: pytest.MonkeyPatch) -> None:
    steps = MatchingConfig(steps=2)
    sizes = partial(AuditConfig, decoder_pairs=40, held_out=10, matching=steps, refinement=steps)
    for module in (commands, invert):
        patch.setattr(module, "AuditConfig", sizes)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    """Run a command that must fail: the exit code, and exactly one line on stderr, which is returned."""
    capsys.readouterr()
    assert run(*words) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"r2f {words[0]}: ") and lines[0].endswith((".", ")")), lines
    assert "Traceback" not in lines[0]
    return lines[0]


def files_under(folder: Path) -> list[str]:
    """Every file below `folder`, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

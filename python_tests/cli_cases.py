"""Commands run in this process, with few matching steps."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from r2f_ext.cli import audit, invert, main
from r2f_ext.config import AuditConfig
from r2f_ext.inversion.matching import MatchingConfig

FIRST = "blocks.0.attn.qkv"
NAMES = ("audit", "demo", "phase0", "pairs", "fit", "decode", "invert")  # the commands that write


def few_steps(patch: pytest.MonkeyPatch) -> None:
    steps = MatchingConfig(steps=2)
    sizes = partial(AuditConfig, decoder_pairs=40, held_out=10, matching=steps, refinement=steps)
    for module in (audit, invert):
        patch.setattr(module, "AuditConfig", sizes)
    patch.setattr(audit, "DEMO", sizes())


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


def pairs_of(adapter: Path, out: Path, *more: object) -> tuple[object, ...]:
    """`r2f pairs` of 20 pairs."""
    return ("pairs", adapter, "--count", 20, "--proxy", "embedded", "--out", out, *more)


def commands_with_out(stages: Any) -> dict[str, tuple[object, ...]]:
    """Every command that writes, without its --out, on the folders of the fixture `stages`."""
    return {
        "audit": ("audit", stages.adapter, "--count", 40, "--proxy", "embedded"),
        "demo": ("demo",),
        "phase0": ("phase0", "--count", 1),
        "pairs": ("pairs", stages.adapter, "--count", 20, "--proxy", "embedded"),
        "fit": ("fit", stages.pairs),
        "decode": ("decode", stages.adapter, "--pairs", stages.pairs, "--decoders", stages.decoders),
        "invert": ("invert", stages.adapter, "--pairs", stages.pairs),
    }


def edit_manifest(folder: Path, **fields: object) -> None:
    """Replace fields of the manifest of stored pairs."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **fields}))

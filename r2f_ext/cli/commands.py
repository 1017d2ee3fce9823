"""The function of every command; its module is imported only when the command runs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

COMMANDS = {
    "audit": "audit:run_audit",
    "demo": "audit:run_demo",
    "study": "study:run_study_command",
    "phase0": "phase0:run_phase0",
    "identifiability": "phase0:run_identifiability",
    "pairs": "pairs:run_pairs",
    "fit": "fit:run_fit",
    "decode": "decode:run_decode",
    "invert": "invert:run_invert",
    "env": "env:run_env",
}
DISTRIBUTED = ("pairs", "fit")  # what torchrun may start

Command = Callable[[argparse.Namespace], dict[str, Any]]


def load(name: str) -> Command:
    """The function of command `name`; it returns what it printed, as data for --json."""
    module, _, function = COMMANDS[name].partition(":")
    command: Command = getattr(importlib.import_module(f"r2f_ext.cli.{module}"), function)
    return command

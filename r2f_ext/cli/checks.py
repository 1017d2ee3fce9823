"""Checks of arguments that do not need torch; the library checks the rest."""

from __future__ import annotations

import argparse
from pathlib import Path

from r2f_ext.cli.options import IMAGES
from r2f_ext.errors import R2FError

MIN_AUDIT_PAIRS = 40  # r2f_ext.audit.run.MIN_PAIRS; a test compares them


def check(options: argparse.Namespace) -> None:
    """Check the numbers, names and paths of a command.

    Raises:
        R2FError: an argument is invalid.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    if "count" in given:
        _at_least("--count", given["count"], 1)
    if "seed" in given:
        _at_least("--seed", given["seed"], 0)
    if options.command == "audit":
        _at_least("--count", given["count"], MIN_AUDIT_PAIRS)
    if "base" in given:
        _base(given["base"], options.command)
    for name in ("proxy", "images"):
        if name in given:
            _images(given[name])
    adapters = given.get("adapter", [])
    for folder in [adapters] if isinstance(adapters, str) else adapters:
        if not Path(folder).is_dir():
            raise R2FError(
                f"adapter folder '{folder}' does not exist: pass a folder written by PEFT's save_pretrained."
            )
    if "pairs" in given and not (Path(given["pairs"]) / "manifest.json").is_file():
        folder = given["pairs"]
        raise R2FError(f"'{folder}' holds no finished pairs (no manifest.json): run r2f pairs --out '{folder}'.")
    if "out" in given:
        _out(Path(given["out"]))
    if "json" in given and Path(given["json"]).is_dir():
        raise R2FError(f"--json '{given['json']}' is a folder: name a file.")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise R2FError(f"{name} must be at least {least}, got {value}.")


def _base(base: str, command: str) -> None:
    if command == "demo" and base != "embedded":
        raise R2FError("the demo trains its victims on the embedded base: leave --base out, or use r2f audit.")
    if base != "embedded" and not base.startswith("timm:") and not Path(base).is_dir():
        raise R2FError(f"unknown base '{base}': use 'embedded', 'timm:NAME', or a folder that exists.")


def _images(spec: str) -> None:
    if spec not in IMAGES and "+" not in spec and not (spec and Path(spec).is_dir()):
        names = ", ".join(IMAGES)
        raise R2FError(f"unknown images '{spec}': use {names}, a folder that exists, or a mix like a+b.")


def _out(folder: Path) -> None:
    """Check that no parent of --out is a file; write permission is checked when the folder is created."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if place.exists():
            raise R2FError(f"cannot write to '{folder}' ('{place}' is a file): choose another folder.")

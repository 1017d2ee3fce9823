"""Checks of arguments that do not need torch; the library checks the rest."""

from __future__ import annotations

import argparse
import re
from math import inf
from pathlib import Path
from typing import Any

from r2f_ext.cli.options import BASE_PREFIXES, BASES, IMAGES, PRIVATE_IMAGES, ROUTES
from r2f_ext.errors import R2FError
from r2f_ext.json_file import read_json_file

MIN_AUDIT_PAIRS = 40  # r2f_ext.audit.run.MIN_PAIRS; a test compares them
MAX_SEED = 2**62  # torch's generators take 64 bits, and some streams add to the seed


def check(options: argparse.Namespace) -> None:
    """Check the numbers, names and paths of a command.

    Raises:
        R2FError: an argument is invalid.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    if "count" in given:
        _at_least("--count", given["count"], MIN_AUDIT_PAIRS if options.command == "audit" else 1)
    for name in ("seed", "a0_seed"):
        if name in given:
            _seed(f"--{name.replace('_', '-')}", given[name])
    if "seeds" in given:
        _at_least("--seeds", given["seeds"], 1)
    if "image_size" in given:
        _at_least("--image-size", given["image_size"], 1)
    if not 0 < given.get("budget", 1.0) < inf:
        raise R2FError(f"--budget must be minutes above 0, got {given['budget']:g}.")
    if "base" in given:
        _base(given["base"], options.command)
    for name in ("proxy", "images", "private") if options.command == "study" else ("proxy", "images"):
        if name in given:
            _images(given[name])
    if "private" in given and options.command != "study":
        _private(given["private"], len(given["adapter"]))
    if "routes" in given:
        _routes(given["routes"])
    _paths(given)


def _paths(given: dict[str, Any]) -> None:
    """Check every argument that names a file or a folder."""
    adapters = given.get("adapter", [])
    for folder in [adapters] if isinstance(adapters, str) else adapters:
        _adapter(Path(folder))
    for name in ("pairs", "cache"):
        if name in given:
            _holds(Path(given[name]), "manifest.json", "finished pairs", "pairs")
    if "decoders" in given:
        _holds(Path(given["decoders"]), "decoders.json", "fitted decoders", "fit")
    if "gradients" in given and not Path(given["gradients"]).is_file():
        raise R2FError(f"'{given['gradients']}' is no file: write it with r2f decode.")
    if "initial" in given:
        _initial(Path(given["initial"]))
    if "replay" in given:
        _report(Path(given["replay"]))
    if "out" in given:
        _out(Path(given["out"]))
    if "json" in given and Path(given["json"]).is_dir():
        raise R2FError(f"--json '{given['json']}' is a folder: name a file.")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise R2FError(f"{name} must be at least {least}, got {value}.")


def _seed(name: str, value: int) -> None:
    _at_least(name, value, 0)
    if value > MAX_SEED:
        raise R2FError(f"{name} must be at most {MAX_SEED}, got {value}.")


def _base(base: str, command: str) -> None:
    if command == "demo" and base != "embedded":
        raise R2FError("the demo trains its victims on the embedded base: leave --base out, or use r2f audit.")
    prefix = next((prefix for prefix in BASE_PREFIXES if base.startswith(prefix)), None)
    if prefix is not None and base == prefix:
        raise R2FError(f"unknown base '{base}': name a model after '{prefix}'.")
    if command == "study" and base.startswith("embedded-"):  # studies have bases of their own
        return
    owner, _, name = base.partition("/")
    if base == "embedded" or prefix is not None or Path(base).is_dir() or (owner and name):
        return  # the library's error says what OWNER/NAME could mean
    raise R2FError(
        f"unknown base '{base}': use {BASES}.{' It is a file: pass the folder that holds it.' * Path(base).is_file()}"
    )


def _images(spec: str) -> None:
    """A name, a folder, or several of these joined by `+`."""
    parts = [spec] if Path(spec).is_dir() else spec.split("+")
    for part in parts:
        if part not in IMAGES and not (part and Path(part).is_dir()):
            names = ", ".join(IMAGES)
            raise R2FError(f"unknown images '{part}': use {names}, a folder that exists, or a mix like a+b.")


def _private(spec: str, adapters: int) -> None:
    """As `_images`, or DATA:INDEX[,INDEX...], one for each adapter."""
    found = re.fullmatch(r"(.+):([0-9,]+)", spec)
    if found is None:
        _images(spec)
        return
    name, numbers = found[1], found[2].split(",")
    _images(name)
    if "" in numbers:
        raise R2FError(f"--private {spec}: write the indices like {name}:3 or {name}:3,7.")
    for number in numbers:
        if int(number) >= PRIVATE_IMAGES.get(name, int(number) + 1):
            raise R2FError(f"--private {spec}: '{name}' has {PRIVATE_IMAGES[name]} images, counted from 0.")
    if adapters and len(numbers) != adapters:
        raise R2FError(
            f"--private {spec} names {len(numbers)} images for {adapters} adapters: name one for each, in their order."
        )


def _routes(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in ROUTES:
            raise R2FError(f"there is no route '{name}': name some of {', '.join(ROUTES)}.")
    if not names:
        raise R2FError(f"--routes names no route: name some of {', '.join(ROUTES)}.")


def _adapter(folder: Path) -> None:
    remedy = "pass a folder written by PEFT's save_pretrained"
    if folder.is_file() and folder.suffix != ".safetensors":  # the library's error names the format of such a file
        raise R2FError(f"adapter '{folder}' is a file, not a folder: {remedy}.")
    if not folder.exists():
        raise R2FError(f"adapter folder '{folder}' does not exist: {remedy}.")


def _initial(folder: Path) -> None:
    remedy = "pass the folder that PEFT saved before the training"
    if not folder.is_dir():
        raise R2FError(f"--initial '{folder}' is not a folder: {remedy}.")
    if not any(folder.glob("*.safetensors")):
        raise R2FError(f"--initial '{folder}' has no adapter_model.safetensors: {remedy}.")


def _holds(folder: Path, file: str, what: str, command: str) -> None:
    if not (folder / file).exists():
        raise R2FError(f"'{folder}' holds no {what} (no {file}): run r2f {command} --out '{folder}'.")


def _report(path: Path) -> None:
    """Check that it is a JSON object with the fields of a report; the library reads it again and checks the rest."""
    remedy = "name a report.json that r2f audit wrote"
    data = read_json_file(path, "not JSON", remedy)
    if not isinstance(data, dict) or "schema" not in data or "reconstruction" not in data:
        raise R2FError(f"'{path}' is not a report: {remedy}.")


def _out(folder: Path) -> None:
    """Check that no parent of --out is a file; write permission is checked when the folder is created."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if place.exists():
            raise R2FError(f"cannot write to '{folder}' ('{place}' is a file): choose another folder.")

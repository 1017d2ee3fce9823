"""The inputs of an audit as recorded in its report, with paths relative to the report's folder."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from r2f_ext.config import AuditConfig
from r2f_ext.data.load import LOADERS


@dataclass(frozen=True)
class Inputs:
    """The arguments of an audit besides its config.

    Attributes:
        adapters: their folders.
        base, proxy, private, initial, a0_seed: as `audit` takes them.
        device: type of the device that the audit ran on.
    """

    adapters: tuple[str, ...]
    base: str
    proxy: str
    private: str | None
    initial: str | None
    a0_seed: int | None
    device: str

    def relative_to(self, folder: Path) -> Inputs:
        """The same inputs; each path becomes relative to `folder` and begins with `./` or `../`, unlike any name."""
        root = folder.resolve()

        def relative(path: str) -> str:
            found = os.path.relpath(Path(path).resolve(), root)
            return found if found.startswith("..") else f"./{found}"

        def spec(text: str) -> str:
            return _each_folder(text, os.path.isdir, relative)

        return self._changed(relative, spec)

    def resolved(self, folder: Path) -> Inputs:
        """The inverse of `relative_to`: paths are absolute again."""
        root = folder.resolve()

        def absolute(path: str) -> str:
            return os.path.normpath(root / path)

        def spec(text: str) -> str:
            return _each_folder(text, lambda part: part.startswith(".") and (root / part).is_dir(), absolute)

        return self._changed(absolute, spec)

    def _changed(self, path: Callable[[str], str], spec: Callable[[str], str]) -> Inputs:
        return replace(
            self,
            adapters=tuple(path(folder) for folder in self.adapters),
            base=spec(self.base),
            proxy=spec(self.proxy),
            private=None if self.private is None else _private(self.private, spec),
            initial=None if self.initial is None else path(self.initial),
        )


def command_of(inputs: Inputs, config: AuditConfig) -> str:
    """The command line of an audit, for a shell in the folder that the paths are relative to.

    Settings of `config` that have no option, such as those of matching, are left out; `--replay` repeats them.
    """
    plain = AuditConfig()
    words = ["r2f", "audit", *inputs.adapters, "--base", inputs.base, "--proxy", inputs.proxy]
    named = {
        "--private": inputs.private,
        "--initial": inputs.initial,
        "--a0-seed": inputs.a0_seed,
        "--count": config.pairs,
        "--routes": None if config.routes is None else ",".join(config.routes),
        "--precision": None if config.precision == plain.precision else config.precision,
        "--budget": config.search.minutes,
        "--seed": config.seed,
        "--device": inputs.device,
    }
    for option, value in named.items():
        words += [] if value is None else [option, str(value)]
    words += ["--gauss-newton"] if config.gauss_newton else []
    return shlex.join([*words, "--out", "."])


def split_private(spec: str) -> tuple[str, list[int] | None]:
    """`DATA:INDEX,...` -> (DATA, the indices); `DATA` -> (DATA, None)."""
    name, _, rows = spec.rpartition(":")
    if not name or not re.fullmatch(r"[0-9]+(,[0-9]+)*", rows):
        return spec, None
    return name, [int(row) for row in rows.split(",")]


def public_name(spec: str) -> str:
    """A spec of images or of a base as reports show it: folders by their last part only."""
    return _each_folder(spec, os.path.isdir, lambda path: Path(path).resolve().name)


def _each_folder(spec: str, is_folder: Callable[[str], bool], change: Callable[[str], str]) -> str:
    """Apply `change` to every folder in `spec`; as in `load_images`, names precede folders, and folders mixes."""
    if spec in LOADERS or spec.startswith("timm:"):
        return spec
    if is_folder(spec):
        return change(spec)
    return "+".join(_each_folder(part, is_folder, change) for part in spec.split("+")) if "+" in spec else spec


def _private(spec: str, change: Callable[[str], str]) -> str:
    """`DATA` or `DATA:INDEX,...`."""
    name, rows = split_private(spec)
    return change(spec) if rows is None else f"{change(name)}:{','.join(map(str, rows))}"

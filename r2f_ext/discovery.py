"""Finds the classes that a package's modules define, so that a new route or study is one file."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

Kind = TypeVar("Kind")


def classes_in(package: str, kind: type[Kind]) -> list[type[Kind]]:
    """The subclasses of `kind` that modules of the package `package` define, in the order of the modules' names."""
    folders = importlib.import_module(package).__path__
    modules = [importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(folders)]
    return [
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, kind) and each.__module__ == module.__name__
    ]

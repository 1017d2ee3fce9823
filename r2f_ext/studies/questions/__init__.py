"""The registry of studies: every `Study` subclass defined in a module of this package is registered automatically."""

from __future__ import annotations

import importlib
import pkgutil

from r2f_ext.errors import R2FError
from r2f_ext.studies.study import Study


def registry() -> dict[str, Study]:
    """Name -> study, sorted by name."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found = [
        each()
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Study) and each.__module__ == module.__name__
    ]
    return {study.name: study for study in sorted(found, key=lambda study: study.name)}


def chosen(name: str) -> list[Study]:
    """The study of that name, or all of them for `all`.

    Raises:
        R2FError: there is no such study.
    """
    studies = registry()
    if name == "all":
        return list(studies.values())
    if name not in studies:
        raise R2FError(f"there is no study '{name}': name one of {', '.join(studies)}, or all.")
    return [studies[name]]

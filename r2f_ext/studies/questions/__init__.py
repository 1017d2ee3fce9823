"""The registry of studies: every `Study` subclass defined in a module of this package is registered automatically."""

from __future__ import annotations

from r2f_ext.discovery import classes_in
from r2f_ext.errors import R2FError
from r2f_ext.studies.study import Study


def registry() -> dict[str, Study]:
    """Name -> study, sorted by name."""
    found = [each() for each in classes_in(__name__, Study)]  # type: ignore[type-abstract]
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

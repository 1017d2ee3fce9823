"""The files of a report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from r2f_ext.audit.figures import has_pictures, write_reconstructions
from r2f_ext.audit.html import write_html
from r2f_ext.audit.report import AuditReport
from r2f_ext.errors import R2FError, plain
from r2f_ext.files import write_tensors, write_text

PAGE, PICTURES, DATA = "report.html", "reconstructions.png", "report.json"
GRADIENTS = "gradients.safetensors"  # of a report with one proxy
PREVIOUS = "previous-"


@contextmanager
def replacing_report(folder: Path) -> Iterator[None]:
    """Context for writing a new report in `folder`: an earlier one is renamed first, and removed when the body is done.

    So report.json and report.html are always those of the last run or absent, and an earlier report outlives a run
    that fails, under names that begin with `previous-`. The error of that run then has a note that says so.

    Raises:
        R2FError: a file cannot be renamed.
    """
    whole = os.path.lexists(folder / DATA)  # gradients without a report are those of `r2f decode`
    for name in (PAGE, PICTURES, GRADIENTS, DATA) if whole else (PAGE, PICTURES):
        _set_aside(folder / name)
    try:
        yield
    except BaseException as error:
        kept = [name for name in (DATA, PAGE) if (folder / f"{PREVIOUS}{name}").exists()]
        if kept:
            names = " and ".join(f"{PREVIOUS}{name}" for name in kept)
            error.add_note(f"The report of an earlier run{_date(folder)} is kept as {names}.")
        raise
    for name in (DATA, PAGE, PICTURES, GRADIENTS):
        with suppress(OSError):  # the new report is complete, and leftover files are named as old
            (folder / f"{PREVIOUS}{name}").unlink(missing_ok=True)


def _set_aside(path: Path) -> None:
    if path.is_dir():
        raise R2FError(f"'{path}' is a folder, where a file of the report is to be: choose another folder.")
    try:
        if os.path.lexists(path):
            path.replace(path.with_name(f"{PREVIOUS}{path.name}"))
    except OSError as error:
        raise R2FError(f"cannot rename the old '{path}' ({error.strerror or error}): choose another folder.") from error


def _date(folder: Path) -> str:
    """`, of 2026-01-31T12:00:00+00:00,`; empty where the earlier report does not say when it was made."""
    try:
        date = json.loads((folder / f"{PREVIOUS}{DATA}").read_text(encoding="utf-8"))["date"]
        return f", of {plain(datetime.fromisoformat(date).isoformat())},"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def report_files(report: AuditReport) -> dict[str, str]:
    """name -> what it holds, of every file that `write_report` writes.

    The gradients of a report with one proxy are in gradients.safetensors, else in gradients_PROXY.safetensors.
    """
    decoded = [proxy for proxy, result in report.results.items() if result.scored.decoded is not None]
    return {
        PAGE: "this page",
        DATA: "all figures, sizes and seeds",
        **({PICTURES: "the pictures in one image"} if has_pictures(report.sets, report.phase0) else {}),
        **{_gradients(report, proxy): "the decoded gradients, layer by layer" for proxy in decoded},
    }


def write_report(folder: Path, report: AuditReport) -> None:
    """Write the decoded gradients, reconstructions.png, report.html and, last, report.json.

    Raises:
        R2FError: a file cannot be written.
    """
    figures = report.figures
    for proxy, result in report.results.items():
        victims = ", ".join(part.name for part in report.sets if part.proxy == proxy)
        about = {"unit": "gradient times the victims' learning rate", "victims": victims}
        if result.scored.decoded is not None:
            write_tensors(folder / _gradients(report, proxy), result.scored.decoded.dense, about)
    if has_pictures(report.sets, report.phase0):
        write_reconstructions(folder / PICTURES, figures, report.sets, report.phase0)
    write_html(folder / PAGE, figures, report.sets, report.phase0, report_files(report))
    write_text(folder / DATA, json.dumps(figures.to_json(), indent=1))


def _gradients(report: AuditReport, proxy: str) -> str:
    return GRADIENTS if len(report.results) == 1 else f"gradients_{proxy}.safetensors"

"""The files of a report."""

from __future__ import annotations

import json
from pathlib import Path

from r2f_ext.audit.figures import write_reconstructions
from r2f_ext.audit.html import write_html
from r2f_ext.audit.report import AuditReport
from r2f_ext.errors import R2FError
from r2f_ext.files import write_tensors, write_text

PAGE, PICTURES, DATA = "report.html", "reconstructions.png", "report.json"


def remove_old_report(folder: Path) -> None:
    """Remove the page, pictures and data of an earlier report, so that they are not taken for those of a run that
    fails.

    Raises:
        R2FError: a file cannot be removed.
    """
    for name in (DATA, PAGE, PICTURES):
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise R2FError(
                f"cannot remove the old '{folder / name}' ({error.strerror or error}): choose another folder."
            ) from error


def report_files(report: AuditReport) -> dict[str, str]:
    """name -> what it holds, of every file that `write_report` writes.

    The gradients of a report with one proxy are in gradients.safetensors, else in gradients_PROXY.safetensors.
    """
    return {
        PAGE: "this page",
        DATA: "all figures, sizes and seeds",
        PICTURES: "the pictures in one image",
        **{_gradients(report, proxy): "the decoded gradients, layer by layer" for proxy in report.results},
    }


def write_report(folder: Path, report: AuditReport) -> None:
    """Write the decoded gradients, reconstructions.png, report.html and, last, report.json.

    Raises:
        R2FError: a file cannot be written.
    """
    data = report.to_json()
    for proxy, result in report.results.items():
        victims = ", ".join(part.name for part in report.sets if part.proxy == proxy)
        about = {"unit": "the victims' learning rate", "victims": victims}
        write_tensors(folder / _gradients(report, proxy), result.decoded.dense, about)
    write_reconstructions(folder / PICTURES, data, report.sets, report.phase0)
    write_html(folder / PAGE, data, report.sets, report.phase0, report_files(report))
    write_text(folder / DATA, json.dumps(data, indent=1))


def _gradients(report: AuditReport, proxy: str) -> str:
    return "gradients.safetensors" if len(report.results) == 1 else f"gradients_{proxy}.safetensors"

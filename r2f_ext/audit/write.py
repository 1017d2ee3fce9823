"""The files of a report."""

from __future__ import annotations

import json
from pathlib import Path

from r2f_ext.audit.figures import write_reconstructions
from r2f_ext.audit.html import write_html
from r2f_ext.audit.report import AuditReport
from r2f_ext.files import write_tensors, write_text


def write_report(folder: Path, report: AuditReport) -> None:
    """Write the decoded gradients, reconstructions.png, report.html and, last, report.json.

    The gradients of a report with one proxy are in gradients.safetensors, else in gradients_PROXY.safetensors.

    Raises:
        R2FError: a file cannot be written.
    """
    data = report.to_json()
    for proxy, result in report.results.items():
        name = "gradients" if len(report.results) == 1 else f"gradients_{proxy}"
        victims = ", ".join(part.name for part in report.sets if part.proxy == proxy)
        about = {"unit": "the victims' learning rate", "victims": victims}
        write_tensors(folder / f"{name}.safetensors", result.decoded.dense, about)
    write_reconstructions(folder / "reconstructions.png", report.sets, report.phase0)
    write_html(folder / "report.html", data, report.sets, report.phase0)
    write_text(folder / "report.json", json.dumps(data, indent=1))

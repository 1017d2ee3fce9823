"""`replay`: repeat an audit from its report.json, and compare the figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r2f_ext.audit.entry import Prepared, audit
from r2f_ext.audit.record import Inputs
from r2f_ext.audit.report import AuditReport
from r2f_ext.audit.schema import SCHEMA
from r2f_ext.config import AuditConfig
from r2f_ext.errors import R2FError
from r2f_ext.progress import Stages


def replay(
    path: str | Path,
    *,
    out: str | Path | None = None,
    device: str | None = None,
    stages: Stages | None = None,
    on_ready: Callable[[Prepared], None] = lambda ready: None,
) -> AuditReport:
    """Repeat the audit that wrote a report.json, with the adapters, images, sizes and seeds that it records.

    Args:
        path: a report.json, in the folder that it was written to: its paths are relative to that folder.
        out, stages, on_ready: as for `audit`.
        device: None takes the type of device that the report names.

    Raises:
        R2FError: not a report of `r2f audit`, or an input that it names does not exist.
    """
    data = read_report(path)
    if not data.get("inputs"):
        raise R2FError(f"'{path}' does not say what was audited: a demo is repeated by r2f demo with the same --seed.")
    try:
        recorded = Inputs(**{**data["inputs"], "adapters": tuple(data["inputs"]["adapters"])})
    except (KeyError, TypeError) as error:
        raise R2FError(f"the inputs in '{path}' are not what this version writes ({error}): audit anew.") from error
    given = recorded.resolved(Path(path).parent)
    return audit(
        given.adapters,
        base=given.base,
        proxy=given.proxy,
        private=given.private,
        out=out,
        config=AuditConfig.from_json(data["config"]),
        device=device or given.device,
        initial=given.initial,
        a0_seed=given.a0_seed,
        stages=stages,
        on_ready=on_ready,
    )


def read_report(path: str | Path) -> dict[str, Any]:
    """The data of a report.json.

    Raises:
        R2FError: missing, or not a report.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if 1 <= data["schema"] <= SCHEMA:
            return dict(data)
        raise R2FError(f"'{path}' has schema {data['schema']}, and this version reads 1 to {SCHEMA}: audit anew.")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise R2FError(f"'{path}' is not a report.json that r2f audit wrote: name one.") from error


def largest_change_db(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """The largest difference between the mean PSNRs of two reports, over sets and routes; None where none is scored.

    Args:
        before, after: data of report.json.
    """

    def scored(report: dict[str, Any]) -> dict[tuple[str, str], float]:
        return {
            (name, route): values["psnr_db_mean"]
            for name, part in report["reconstruction"].items()
            for route, values in part["routes"].items()
            if values["psnr_db_mean"] is not None
        }

    one, other = scored(before), scored(after)
    return max((abs(one[key] - other[key]) for key in one.keys() & other.keys()), default=None)

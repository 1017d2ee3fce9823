"""`r2f audit` and `r2f demo`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from r2f_ext.audit.demo import DEMO, demo
from r2f_ext.audit.entry import Prepared, audit
from r2f_ext.audit.replay import largest_change_db, read_report, replay
from r2f_ext.audit.report import AuditReport, target_figures
from r2f_ext.audit.write import report_files
from r2f_ext.cli.device import chosen_device
from r2f_ext.cli.display import console, drawn_stages, print_report, print_target
from r2f_ext.cli.inputs import Options
from r2f_ext.config import AuditConfig
from r2f_ext.files import output_folder
from r2f_ext.inversion.task import GaussNewtonConfig


def run_audit(options: Options) -> dict[str, Any]:
    if options.replay is not None:
        return _replay(options)
    config = AuditConfig(
        pairs=options.count,
        routes=options.routes,
        gauss_newton=options.gauss_newton,
        search=GaussNewtonConfig(minutes=options.budget),
        precision=options.precision,
        seed=options.seed,
    )
    with drawn_stages() as stages:
        report = audit(
            options.adapter,
            base=options.base,
            proxy=options.proxy,
            private=options.private,
            out=options.out,
            config=config,
            device=chosen_device(options),
            initial=options.initial,
            a0_seed=options.a0_seed,
            stages=stages,
            on_ready=_print_prepared,
        )
    return _print_finished(report, options.out)


def run_demo(options: Options) -> dict[str, Any]:
    folder = output_folder(options.out)
    with drawn_stages() as stages:
        report = demo(folder, replace(DEMO, seed=options.seed), chosen_device(options), stages)
    return _print_finished(report, options.out)


def _replay(options: Options) -> dict[str, Any]:
    recorded = read_report(options.replay)
    device = None if options.device == "auto" else chosen_device(options)
    with drawn_stages() as stages:
        report = replay(options.replay, out=options.out, device=device, stages=stages, on_ready=_print_prepared)
    data = _print_finished(report, options.out)
    change = largest_change_db(recorded, data)
    if change is not None:
        console.print(f"largest change of a mean PSNR against '{escape(options.replay)}': {change:.2f} dB")
    if recorded["versions"] != data["versions"]:
        console.print("note: the recorded audit ran with other versions of the packages.")
    return data


def _print_prepared(ready: Prepared) -> None:
    steps = " ".join(ready.evidence.sentences)
    print_target(target_figures(ready.target, ready.verdicts), steps)


def _print_finished(report: AuditReport, out: str | None) -> dict[str, Any]:
    console.print()
    print_report(report.figures)
    seconds = f"{report.seconds['total']:.0f} s"
    if out is None:
        console.print(seconds)
        return report.to_json()
    console.print(f"{seconds}; see:")
    for name in report_files(report):
        console.print(f"  {escape(str(Path(out) / name))}")
    return report.to_json()

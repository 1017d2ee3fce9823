"""Progress bars and tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from r2f_ext.progress import Advance, Stages

console = Console(highlight=False, soft_wrap=True)
CONTROL = "red"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        if task.total is None or task.total <= 1:
            return Text("")
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


class Bars:
    """Progress bars on a terminal; on a pipe, one plain line at the end of each stage."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(24),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            console=console,
        )
        self.tasks: dict[str, Any] = {}

    def start(self, stage: str, total: int) -> Advance:
        task = self.progress.add_task(stage, total=total)
        self.tasks[stage] = task
        return lambda units: self.progress.advance(task, units)

    def finish(self, stage: str, completed: bool) -> None:
        task = next(t for t in self.progress.tasks if t.id == self.tasks[stage])
        if not completed:
            self.progress.stop_task(task.id)
            if not console.is_terminal:
                console.print(f"{stage}: stopped after {task.elapsed or 0:.1f} s")
            return
        self.progress.update(task.id, completed=task.total)
        if not console.is_terminal:
            rate = f", {task.total / task.elapsed:,.0f}/s" if task.total and task.total > 1 and task.elapsed else ""
            console.print(f"{stage}: {task.elapsed or 0:.1f} s{rate}")


@contextmanager
def drawn_stages() -> Iterator[Stages]:
    """Stages that draw their progress on the terminal."""
    bars = Bars()
    if not console.is_terminal:
        yield Stages(bars)
        return
    with bars.progress:
        yield Stages(bars)


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a table; rows whose first cell begins with `control` are marked."""
    drawn = Table(title=Text(title), title_justify="left", title_style="bold", box=None)
    drawn.pad_edge, drawn.padding = False, (0, 2, 0, 0)
    for i, name in enumerate(head):
        drawn.add_column(name, justify="left" if i == 0 or name == "why" else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row), style=CONTROL if row[0].startswith("control") else None)
    console.print(drawn)
    console.print()


def print_target(target: dict[str, Any]) -> None:
    """Base, layers and rank of an adapter, and the count of every route."""
    layers = target["layers"]
    console.print(
        f"base {escape(target['base'])}, {len(layers)} adapted layers, rank {target['rank']}, "
        f"scale {layers[0]['scale']:g}, {target['tokens']} tokens; {target['steps']}"
    )
    print_verdicts([(route, ok, target["why"][route]) for route, ok in target["identifiable"].items()])


def print_verdicts(verdicts: list[tuple[str, bool, str]]) -> None:
    """One row per (route, equations suffice, why)."""
    rows = [[route, "yes" if ok else "no", why] for route, ok, why in verdicts]
    table("Equations against unknowns, route by route", ["route", "enough?", "why"], rows)


def print_report(report: dict[str, Any]) -> None:
    """The figures of an audit, from the data of report.json."""
    if report["phase0"]:
        print_phase0("Phase 0: the exact gradient, inverted in closed form", report["phase0"])
    for proxy, part in report["proxies"].items():
        _print_decoders(proxy, part)
    _print_notes(report["notes"])
    for name, figures in report["reconstruction"].items():
        rows = [_route_row(route, values) for route, values in figures["routes"].items()]
        rows += [
            [f"control: {control.replace('_', ' ')}", f"{value:.2f}", "", "", ""]
            for control, value in figures["controls"].items()
        ]
        title = f"{name}: {figures['n']} adapters, proxy {figures['proxy']}"
        table(title, ["", "PSNR dB", "std", "SSIM", "labels right"], rows)
        console.print(Text(figures["verdict"], style="bold"))
        _print_notes(figures["notes"])
        console.print()


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        console.print(Text(note, style="yellow"))


def _route_row(route: str, values: dict[str, Any]) -> list[str]:
    if values["psnr_db_mean"] is None:
        return [route, "not scored", "", "", ""]
    accuracy = values["label_accuracy"]
    return [
        route,
        f"{values['psnr_db_mean']:.2f}",
        f"{values['psnr_db_std']:.2f}",
        f"{values['ssim_mean']:.3f}",
        "" if accuracy is None else f"{accuracy:.0%}",
    ]


def print_phase0(title: str, figures: list[dict[str, Any]]) -> None:
    """The closed forms' figures on exact gradients."""
    rows = [[f["route"], f"{f['psnr_db_mean']:.1f}", f"{f['psnr_db_min']:.1f}", f"{f['seconds']:.2f}"] for f in figures]
    table(title, ["route", "PSNR dB", "worst", "seconds"], rows)


def _print_decoders(proxy: str, part: dict[str, Any]) -> None:
    by_kind: dict[str, list[dict[str, float]]] = {}
    for kinds in part["decoders"].values():
        for kind, figures in kinds.items():
            by_kind.setdefault(kind, []).append(figures)
    rows = []
    for kind, layers in by_kind.items():
        means = [figures["cosine_mean"] for figures in layers]
        worst_p05 = min(figures["cosine_p05"] for figures in layers)
        rows.append([kind, f"{sum(means) / len(means):.3f}", f"{min(means):.3f}", f"{worst_p05:.3f}"])
    pairs = part["pairs"]
    title = f"Decoders, proxy {proxy} ({pairs['count']:,} pairs, {pairs['per_second']:,.0f} a second): held-out cosine"
    table(title, ["kind", "mean", "worst layer", "worst 5%"], rows)

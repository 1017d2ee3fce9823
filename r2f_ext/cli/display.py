"""Progress bars, tables and reports on the terminal; without a terminal, plain lines that are never wrapped."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from r2f_ext.audit.accuracy import DecoderFigures
from r2f_ext.audit.names import counted, layers_in_words, row_name
from r2f_ext.audit.schema import (
    ClosedFormFigures,
    ProxyFigures,
    ReportFigures,
    RouteFigures,
    SetFigures,
    TargetFigures,
)
from r2f_ext.inversion.exactness import Exactness
from r2f_ext.progress import Advance, Stages

PIPE_WIDTH = 10_000  # wider than any row, so that a program that reads the pipe gets each row on one line
CONTROL = "red"
# Fields of a decoder's figures, which are shown where they are known -> headings of their columns.
BESIDE = {
    "victim_true": "private images",
    "victim_estimate": "estimate for victims",
    "class_mean_cosine": "class mean",
    "floor_cosine": "floor",
}


def console_for(terminal: bool) -> Console:
    """A console for a terminal, with the terminal's width, or for a pipe."""
    return Console(highlight=False, soft_wrap=True, width=None if terminal else PIPE_WIDTH)


console = console_for(sys.stdout.isatty())


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

        def advance(units: int, line: str = "", /) -> None:
            self.progress.advance(task, units)
            if line:
                console.print(escape(f"{stage}: {line}"))

        return advance

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
    if console.is_terminal:
        console.print(drawn)
    else:  # rich fills up every row with spaces
        with console.capture() as text:
            console.print(drawn)
        console.out("\n".join(line.rstrip() for line in text.get().splitlines()))
    console.print()


def print_target(target: TargetFigures, steps: str) -> None:
    """Print base, layers and rank of an adapter, what is known of its training, and for every route its count of
    equations and unknowns."""
    console.print(f"base {escape(target.base)}, {layers_in_words(target.layers)}, {target.tokens} tokens; {steps}")
    print_verdicts([(route, ok, target.why[route]) for route, ok in target.identifiable.items()])


def print_verdicts(verdicts: list[tuple[str, bool, str]]) -> None:
    """One row per (route, equations suffice, why)."""
    rows = [[route, "yes" if ok else "no", why] for route, ok, why in verdicts]
    table("Equations against unknowns, route by route", ["route", "enough?", "why"], rows)


def print_report(report: ReportFigures) -> None:
    """The verdict and the figures of an audit."""
    _print_verdict(report.verdict.sentences)
    for facts in report.adapters:
        print_notes([f"{facts.name}: {sentence}" for sentence in (*facts.leaks, *facts.notes)])
    print_notes(report.notes)
    for name, figures in report.reconstruction.items():
        _print_set(name, figures, alone=len(report.reconstruction) == 1)
    if report.phase0:
        print_phase0("Phase 0: the exact gradient, inverted in closed form", report.phase0)
    for proxy, part in report.proxies.items():
        _print_decoders(proxy, part)
    for one in report.verdict.not_tried:
        console.print(Text(f"not tried: {one.route}: {one.why}"))


def _print_verdict(sentences: list[str]) -> None:
    """The first sentence in bold, then the others."""
    for i, sentence in enumerate(sentences):
        console.print(Text(sentence, style="bold" if i == 0 else ""))
    console.print()


def _print_set(name: str, figures: SetFigures, alone: bool) -> None:
    """Print a table of scores if the set is scored, and for any set each route's result and the notes."""
    if not alone:
        console.print(Text(f"{name}: {figures.verdict}", style="bold"))
    title = f"{name}: {counted(figures.n, 'adapter')}, proxy {figures.proxy}"
    if figures.controls or any(values.psnr_db_mean is not None for values in figures.routes.values()):
        _print_scores(title, figures)
    elif not figures.routes:
        console.print(Text(f"{title}; no route ran", style="bold"))
    else:
        console.print(Text(f"{title}; without private images there is no PSNR", style="bold"))
    for route, values in figures.routes.items():
        exact = f": {_exact_words(values.exact, figures.n)}." if values.exact else ":"
        console.print(Text(f"{row_name(route)}{exact} {values.why}"))
    if figures.pairing:
        console.print(Text(figures.pairing))
    print_notes(figures.notes)
    console.print()


def _exact_words(exact: Sequence[Exactness], count: int) -> str:
    if count == 1:
        return exact[0].words
    certain = [f"victim {i + 1} {one.words}" for i, one in enumerate(exact) if one.exact]
    return f"{len(certain)} of {count} exact{': ' * bool(certain)}{', '.join(certain)}"


def _print_scores(title: str, figures: SetFigures) -> None:
    rows = [_route_row(route, values) for route, values in figures.routes.items()]
    rows += [
        [row_name(control), f"{value:.2f}", "", "", "", _difference(figures, control)]
        for control, value in figures.controls.items()
    ]
    head = ["", "PSNR dB", "std", "SSIM", "labels right", "judged route above it (interval)"]
    shown = len(head) if figures.control_intervals else len(head) - 1
    table(title, head[:shown], [row[:shown] for row in rows])


def _difference(figures: SetFigures, control: str) -> str:
    """By how much the judged route is better than a control."""
    found = figures.control_intervals.get(control)
    if found is None:
        return ""
    interval = found.interval_db
    return f"{found.difference_db:+.1f}" + (f" ({interval[0]:+.1f} to {interval[1]:+.1f})" if interval else "")


def print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        console.print(Text(note, style="yellow"))


def _route_row(route: str, values: RouteFigures) -> list[str]:
    accuracy = values.label_accuracy
    return [
        row_name(route),
        f"{values.psnr_db_mean:.2f}",
        f"{values.psnr_db_std:.2f}",
        f"{values.ssim_mean:.3f}",
        "" if accuracy is None else f"{accuracy:.0%}",
        "",
    ]


def print_phase0(title: str, figures: Sequence[ClosedFormFigures]) -> None:
    """The closed forms' figures on exact gradients."""
    rows = [[one.route, f"{one.psnr_db_mean:.1f}", f"{one.psnr_db_min:.1f}", f"{one.seconds:.2f}"] for one in figures]
    table(title, ["route", "PSNR dB", "worst", "seconds"], rows)


def _print_decoders(proxy: str, part: ProxyFigures) -> None:
    by_kind: dict[str, list[DecoderFigures]] = {}
    for kinds in part.decoders.values():
        for kind, figures in kinds.items():
            by_kind.setdefault(kind, []).append(figures)
    rows = []
    every = [figures for layers in by_kind.values() for figures in layers]
    more = [(key, name) for key, name in BESIDE.items() if _known(every, key)]
    for kind, layers in by_kind.items():
        means = [one.cosine_mean for one in layers]
        rows.append([kind, _mean(means), f"{min(means):.3f}", f"{min(one.cosine_p05 for one in layers):.3f}"])
        rows[-1] += [_mean(_known(layers, key)) for key, _ in more]
    if not rows:
        return
    speed = f"{counted(part.pairs.count, 'pair')}, {part.pairs.per_second:,.0f} a second"
    title = f"Decoders, proxy {proxy} ({speed}): cosine on held-out pairs of the proxy"
    table(title, ["kind", "mean", "worst layer", "worst 5%", *(name for _, name in more)], rows)


def _known(layers: Sequence[DecoderFigures], field: str) -> list[float]:
    """A figure of the layers of which it is known."""
    return [value for figures in layers if (value := getattr(figures, field)) is not None]


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else ""

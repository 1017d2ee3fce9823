"""The figure of a study: one plot per panel, with 95 % intervals; numbers on the x axis give lines, words bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from r2f_ext.files import write_atomically
from r2f_ext.studies.study import Panel
from r2f_ext.studies.table import Row, Table, Value

WIDTH, HEIGHT, COLUMNS, DPI = 6.2, 4.0, 2, 110  # inches of a panel; panels per row; dots per inch
# Okabe and Ito's palette, which readers with impaired colour vision can tell apart; then other line styles.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLES, MARKERS = ("-", "--", ":", "-."), "osD^vPX"
MANY = 6  # with more lines than this the legend is beside the plot; with bars, which fill the plot, from 3 on
UNITS = {"psnr_db": "PSNR in dB", "cosine": "cosine", "accuracy": "accuracy", "seconds": "seconds"}


def write_figure(path: Path, panels: Sequence[Panel], table: Table) -> None:
    """Write the panels that have rows in the table as one PNG; without any, nothing is written."""
    drawn = [(panel, rows) for panel in panels if (rows := table.where(panel.metric, **panel.where))]
    drawn = [(panel, _with_x(panel.x, rows, table)) for panel, rows in drawn]
    drawn = [(panel, rows) for panel, rows in drawn if rows]
    if not drawn:
        return
    columns = min(COLUMNS, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * lines), layout="constrained")
    for number, (panel, rows) in enumerate(drawn):
        _draw(figure.add_subplot(lines, columns, number + 1), panel, rows)
    about = {"Software": None}
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI, metadata=about))


def _with_x(x: str, rows: Sequence[Row], table: Table) -> list[Row]:
    """The rows with a column x. If x is a metric, rows without one get its mean at their setting as column x."""
    found, others = [row for row in rows if x in row.keys], table.where(x)
    for row in rows if others else ():
        across = next((other for other in others if other.keys.items() <= row.keys.items()), None)
        if across is not None:
            found.append(replace(row, keys={**row.keys, x: across.mean}))
    return found


def _draw(axes: Axes, panel: Panel, rows: Sequence[Row]) -> None:
    series: dict[str, list[Row]] = {}
    for row in rows:
        name = ", ".join(str(row.keys[key]) for key in panel.series if key in row.keys)
        series.setdefault(name, []).append(row)
    positions = list(dict.fromkeys(row.keys[panel.x] for row in rows))
    if all(_is_number(x) for x in positions):
        _lines(axes, panel, series)
    else:
        _bars(axes, panel, series, positions)
    for height, words in panel.lines.items():
        axes.axhline(height, color="0.45", linewidth=0.9, linestyle=":")
        axes.annotate(words, (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
    if panel.y_log:
        axes.set_yscale("log")
    axes.set_title(panel.title or f"{panel.metric} by {panel.x}", fontsize=10)
    axes.set_xlabel(panel.x_label or panel.x)
    axes.set_ylabel(panel.y_label or UNITS.get(panel.metric, panel.metric))
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if len(series) > 1:
        outside = len(series) > (2 if axes.patches else MANY)
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if outside else {"loc": "best"}
        axes.legend(fontsize=7, frameon=False, **place)


def _lines(axes: Axes, panel: Panel, series: dict[str, list[Row]]) -> None:
    for number, (name, rows) in enumerate(series.items()):
        rows = sorted(rows, key=lambda row: float(row.keys[panel.x]))
        x, y = [float(row.keys[panel.x]) for row in rows], [row.mean for row in rows]
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        axes.plot(x, y, style, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4, label=name)
        low = [row.mean if row.low is None else row.low for row in rows]
        high = [row.mean if row.high is None else row.high for row in rows]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if panel.x_log:
        axes.set_xscale("log")
        ticks = sorted({float(row.keys[panel.x]) for rows in series.values() for row in rows})
        if len(ticks) <= 10 and ticks[0] >= 1:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()


def _bars(axes: Axes, panel: Panel, series: dict[str, list[Row]], positions: Sequence[Value]) -> None:
    width = 0.8 / len(series)
    for number, (name, rows) in enumerate(series.items()):
        x = [positions.index(row.keys[panel.x]) + width * (number - (len(series) - 1) / 2) for row in rows]
        y = [row.mean for row in rows]
        below = [0.0 if row.low is None else max(0.0, row.mean - row.low) for row in rows]
        above = [0.0 if row.high is None else max(0.0, row.high - row.mean) for row in rows]
        colour = COLOURS[number % len(COLOURS)]
        axes.bar(x, y, width, yerr=(below, above), color=colour, ecolor="0.35", capsize=2, label=name)
    words = [str(position) for position in positions]
    tilted = (
        {"rotation": 30, "ha": "right", "fontsize": 8} if max(map(len, words)) * len(words) > 60 else {"fontsize": 8}
    )
    axes.set_xticks(range(len(words)), words, **tilted)


def _is_number(value: Value) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)

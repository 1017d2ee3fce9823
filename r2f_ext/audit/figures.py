"""Pictures: rows of originals, reconstructions and controls."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.audit.names import row_name
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.schema import ReportFigures, SetFigures
from r2f_ext.audit.sets import SetReport
from r2f_ext.files import write_atomically
from r2f_ext.inversion.exactness import Exactness

MAX_COLUMNS = 16
DPI = 110
LABEL, GAP, LINE, TITLE = 1.8, 0.06, 0.16, 0.42  # inches: names of rows, between cells, a caption line, a block's title
CELLS = {2: 1.7, 4: 1.3, 8: 0.95, MAX_COLUMNS: 0.7}  # up to so many columns -> width of a picture in inches
CONTROL, EXACT = "#a32a12", "#116329"


@dataclass(frozen=True)
class Row:
    """One row of pictures.

    Attributes:
        key: a route, a control or `original`.
        images: [n, c, h, w] in [0, 1].
        psnr_db: against the original of the same victim, [n]; empty where there is nothing to compare.
        exact: words on each exact recovery ("exact to 78 dB"), None for any other; empty: no route of this kind.
    """

    key: str
    images: Tensor
    psnr_db: tuple[float, ...] = ()
    exact: tuple[str | None, ...] = ()

    @property
    def name(self) -> str:
        return row_name(self.key)

    def captions(self, i: int) -> list[tuple[str, bool]]:
        """Lines under picture i, each with whether it states an exact recovery."""
        lines = [(f"{self.psnr_db[i]:.1f} dB", False)] if self.psnr_db else []
        words = self.exact[i] if self.exact else None
        return lines if words is None else [*lines, (f"✓ {words}", True)]


def rows_of(part: SetReport, figures: SetFigures) -> list[Row]:
    """Rows of a set and its figures, from top to bottom: the originals, the routes, the controls."""
    rows = [] if part.originals is None else [Row("original", part.originals)]
    for found in reversed(part.reconstructions):
        rows.append(_row(found.route, found.images, part.originals, figures.routes[found.route].exact))
    if part.controls is not None:
        rows += [_row(name, images, part.originals) for name, images in part.controls.items().items()]
    return rows


def _row(key: str, images: Tensor, originals: Tensor | None, exact: Sequence[Exactness] | None = None) -> Row:
    psnr = () if originals is None else tuple(psnr_db(images.cpu(), originals).tolist())
    words = tuple(one.words if one.exact else None for one in exact or ())
    return Row(key, images, psnr, words)


def closed_form_rows(phase0: Sequence[Phase0Report]) -> list[Row]:
    """Rows of what exact gradients give away."""
    return [Row(one.figures.route, one.images) for one in phase0]


def png_bytes(image: Tensor) -> bytes:
    """[c, h, w] in [0, 1] -> PNG."""
    pixels = (image.clamp(0, 1) * 255).round().byte().cpu().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def has_pictures(sets: Sequence[SetReport], phase0: Sequence[Phase0Report]) -> bool:
    """Whether there is anything to draw: there is not where no route ran and nothing is scored."""
    return bool(phase0) or any(part.reconstructions or part.controls for part in sets)


def write_reconstructions(
    path: Path, figures: ReportFigures, sets: Sequence[SetReport], phase0: Sequence[Phase0Report]
) -> None:
    """One PNG: a block for each set, a column for each victim, a row for each route and control.

    Args:
        figures: of the same sets.
        phase0: what exact gradients give away, drawn under the first set.
    """
    blocks = []
    for i, part in enumerate(sets):
        rows = rows_of(part, figures.reconstruction[part.name]) + (closed_form_rows(phase0) if i == 0 else [])
        shown = f"; the first {MAX_COLUMNS} of {part.count} victims" if part.count > MAX_COLUMNS else ""
        if rows:
            blocks.append((f"{part.name}  (proxy: {part.proxy}{shown})", rows))
    _draw(path, blocks, "PSNR in dB under each picture: higher is closer to the original. ✓: recovered exactly.")


def write_images(path: Path, rows: list[tuple[str, Tensor]]) -> None:
    """One PNG with a row of images [n, c, h, w] for each (name, images)."""
    _draw(path, [("", [Row(key, images) for key, images in rows])], "")


def _draw(path: Path, blocks: list[tuple[str, list[Row]]], legend: str) -> None:
    """One PNG of titled blocks; `legend` stands in the last line."""
    columns = min(MAX_COLUMNS, max(len(rows[0].images) for _, rows in blocks))
    cell = next(inches for most, inches in CELLS.items() if columns <= most)
    tall = sum(_title_height(text) + sum(_height(row, cell, columns) for row in rows) for text, rows in blocks)
    width, height = LABEL + columns * (cell + GAP) + GAP, tall + 2 * GAP + 1.5 * LINE * bool(legend)
    width = max(width, 0.075 * max(len(text) for text in (legend, *(text for text, _ in blocks))) + 0.3)
    figure = Figure(figsize=(width, height), facecolor="white", dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))  # one for all, in inches: an Axes for each picture takes seconds
    top = height - GAP
    for text, rows in blocks:
        top -= _title_height(text)
        _write(axes, GAP, top + 0.14, text, fontsize=10, weight="bold")
        for row in rows:
            _draw_row(axes, top, row, cell, columns)
            top -= _height(row, cell, columns)
    _write(axes, GAP, GAP, legend, fontsize=8)
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _title_height(text: str) -> float:
    return TITLE if text else 0.0


def _height(row: Row, cell: float, columns: int) -> float:
    """Of a row in inches, with its captions and the gap below."""
    lines = max(len(_wrapped(row, i, cell)) for i in range(min(columns, len(row.images))))
    return cell * row.images.shape[-2] / row.images.shape[-1] + lines * LINE + 2 * GAP


def _wrapped(row: Row, i: int, cell: float) -> list[tuple[str, bool]]:
    """The captions of picture i in lines that are not wider than its cell."""
    wide = max(8, int(cell / 0.066))
    return [(line, exact) for text, exact in row.captions(i) for line in textwrap.wrap(text, wide)]


def _draw_row(axes: Axes, top: float, row: Row, cell: float, columns: int) -> None:
    """A name, its images and their captions, from `top` inches above the lower edge downwards."""
    tall = cell * row.images.shape[-2] / row.images.shape[-1]
    color = CONTROL if row.name.startswith("control") else "black"
    name = "\n".join(textwrap.wrap(row.name, 22))
    _write(axes, GAP, top - tall / 2, name, fontsize=9, color=color, va="center")
    for i, image in enumerate(row.images[:columns]):
        left = LABEL + i * (cell + GAP)
        pixels = image.cpu().permute(1, 2, 0).clamp(0, 1).numpy()
        place = (left, left + cell, top - tall, top)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto", extent=place)
        for line, (text, exact) in enumerate(_wrapped(row, i, cell)):
            shown = {"color": EXACT, "weight": "bold"} if exact else {"color": color}
            _write(axes, left, top - tall - 0.02 - line * LINE, text, fontsize=7.5, va="top", **shown)


def _write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Text taken literally: names of sets are those of folders, and may hold a dollar sign."""
    axes.text(x, y, text, parse_math=False, **style)

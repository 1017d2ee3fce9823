"""Pictures: rows of originals, controls and reconstructions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.sets import SetReport
from r2f_ext.files import write_atomically
from r2f_ext.inversion.routes import registry

MAX_COLUMNS = 16
CELL_INCHES = 0.62
ROW_NAMES = {
    "original": "original",
    "mean_image": "control: mean image",
    "class_mean": "control: class mean",
    "nearest_proxy": "control: nearest proxy",
    "shuffled_adapter": "control: other adapter",
}


def rows_of(part: SetReport) -> list[tuple[str, Tensor]]:
    """(key, images [n, c, h, w]) from top to bottom."""
    rows = [] if part.originals is None else [("original", part.originals)]
    rows += [(r.route, r.images) for r in reversed(part.reconstructions)]
    if part.controls is not None:
        rows += list(part.controls.items().items())
    return rows


def row_name(key: str) -> str:
    route = registry().get(key)
    return ROW_NAMES.get(key, key) if route is None else route.title or key


def png_bytes(image: Tensor, scale: int = 2) -> bytes:
    """[c, h, w] in [0, 1] -> PNG, each pixel `scale` times as large."""
    pixels = (image.clamp(0, 1) * 255).round().byte().cpu().permute(1, 2, 0).numpy()
    pixels = np.repeat(np.repeat(pixels, scale, 0), scale, 1)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def write_reconstructions(path: Path, sets: Sequence[SetReport], phase0: Sequence[Phase0Report]) -> None:
    """One PNG: a block for each set, a column for each victim, a row for each route and control.

    Args:
        phase0: what exact gradients give away, drawn under the first set.
    """
    closed_forms = [(figures.route, figures.images) for figures in phase0]
    blocks = [(part, rows_of(part) + (closed_forms if i == 0 else [])) for i, part in enumerate(sets)]
    columns = min(MAX_COLUMNS, max(len(rows[0][1]) for _, rows in blocks))
    total_rows = sum(len(rows) + 1 for _, rows in blocks)
    height, width = (total_rows + 0.3) * CELL_INCHES, (columns + 3.2) * CELL_INCHES
    figure = Figure(figsize=(width, height), facecolor="white")
    top = total_rows + 0.15
    for part, rows in blocks:
        # parse_math: a set's name is a folder's name, and may hold a dollar sign.
        height_of_title = (top - 0.65) * CELL_INCHES / height
        figure.text(0.01, height_of_title, _title(part), fontsize=10, weight="bold", parse_math=False)
        top -= 1
        for key, images in rows:
            top -= 1
            _draw_row(figure, top, key, images[:columns])
    _save(figure, path)


def _draw_row(figure: Figure, bottom: float, key: str, images: Tensor) -> None:
    """A name and its images; `bottom` in cells from the lower edge."""
    width, height = figure.get_size_inches() / CELL_INCHES
    color = "#b03020" if row_name(key).startswith("control") else "black"
    figure.text(0.01, (bottom + 0.4) / height, row_name(key), fontsize=8, color=color)
    for column, image in enumerate(images):
        axes = figure.add_axes(((3.1 + column) / width, bottom / height, 0.96 / width, 0.96 / height))
        axes.imshow(image.cpu().permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", interpolation="nearest")
        axes.set_axis_off()


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def _title(part: SetReport) -> str:
    return f"{part.name}  (proxy: {part.proxy})"


def write_images(path: Path, rows: list[tuple[str, Tensor]]) -> None:
    """One PNG with a row of images [n, c, h, w] for each (name, images)."""
    columns = min(MAX_COLUMNS, len(rows[0][1]))
    width, height = (columns + 3.2) * CELL_INCHES, (len(rows) + 0.2) * CELL_INCHES
    figure = Figure(figsize=(width, height), facecolor="white")
    for i, (key, images) in enumerate(rows):
        _draw_row(figure, len(rows) - i - 0.9, key, images[:columns])
    _save(figure, path)

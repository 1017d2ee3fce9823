"""report.html: a self-contained page with all pictures embedded; it loads no other resource."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from r2f_ext.audit.figures import png_bytes, row_name, rows_of
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.sets import SetReport
from r2f_ext.files import write_text

ASSETS = Path(__file__).parent / "assets"
TEMPLATE = "report.html.j2"


def write_html(path: Path, data: dict[str, Any], sets: Sequence[SetReport], phase0: Sequence[Phase0Report]) -> None:
    """Write report.json's `data` and the pictures of `sets` and `phase0` as a page; every name in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"row_name": row_name, "inline": _inline}
    pictures = {part.name: rows_of(part) for part in sets}
    closed_forms = [(figures.route, figures.images) for figures in phase0]
    page = environment.get_template(TEMPLATE).render(report=data, pictures=pictures, closed_forms=closed_forms)
    write_text(path, page)


def _inline(image: Tensor) -> str:
    """An image [c, h, w] as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"

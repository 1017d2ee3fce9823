"""report.html: a self-contained page with all pictures embedded; it loads no other resource and runs no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import jinja2
from torch import Tensor

from r2f_ext.audit.figures import Row, closed_form_rows, png_bytes, rows_of
from r2f_ext.audit.names import counted, layers_in_words, row_name
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.schema import ReportFigures, RouteFigures
from r2f_ext.audit.sets import SetReport
from r2f_ext.audit.verdict import ExactImage
from r2f_ext.files import write_text
from r2f_ext.models import AdapterFacts

ASSETS = Path(__file__).parent / "assets"
TEMPLATE = "report.html.j2"
# Up to FEW victims have large pictures, each its own. More share tables of COLUMNS victims, which fit a printed page.
FEW, COLUMNS = 3, 8
MAX_VICTIMS = 48  # with pictures; the figures of all are in report.json


def write_html(
    path: Path,
    figures: ReportFigures,
    sets: Sequence[SetReport],
    phase0: Sequence[Phase0Report],
    files: Mapping[str, str],
) -> None:
    """Write the figures and the pictures of `sets` and `phase0` as a page; every name in it is escaped.

    Args:
        files: name -> what it holds, of the files beside the page.
    """
    victims = _victim_names(figures)
    closed_forms = closed_form_rows(phase0)
    closed_form_count = len(closed_forms[0].images) if closed_forms else 0
    page = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            report=figures,
            victims=victims,
            adapter_count=len(figures.adapters) or max(part.count for part in sets),
            sentences=figures.verdict.sentences,
            exact=_exact(figures.verdict.exact, victims),
            grids={part.name: _groups(rows_of(part, figures.reconstruction[part.name]), part.count) for part in sets},
            labels={part.name: _labels(part) for part in sets},
            exactness={name: _exactness(part.routes, victims[name]) for name, part in figures.reconstruction.items()},
            closed_forms=_groups(closed_forms, closed_form_count),
            closed_form_count=closed_form_count,
            few=FEW,
            max_victims=MAX_VICTIMS,
            facts=_grouped_facts(figures.adapters),
            layers=layers_in_words(figures.target.layers),
            inputs=None if figures.inputs is None else asdict(figures.inputs),
            config=asdict(figures.config),
            files=files,
        )
    )
    write_text(path, page)


def templates_of(*folders: Path, autoescape: bool = True) -> jinja2.Environment:
    """The templates in these folders and in this package's; a name that a template does not know is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, ASSETS]),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


@cache
def _environment() -> jinja2.Environment:
    environment = templates_of()
    environment.filters |= {"row_name": row_name, "inline": _inline, "counted": counted, "percent": _percent}
    return environment


def _inline(image: Tensor) -> str:
    """An image [c, h, w] as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"


def _percent(value: float) -> str:
    """A share as an SVG coordinate, clamped to the drawing."""
    return f"{100 * min(max(value, 0.0), 1.0):.2f}%"


def _victim_names(figures: ReportFigures) -> dict[str, list[str]]:
    """set -> a name for each victim: the adapter's if there is one set, of all adapters; otherwise the victim's
    number."""
    adapters, sets = figures.adapters, figures.reconstruction
    named = len(sets) == 1 and len(adapters) == next(iter(sets.values())).n
    return {
        name: [adapters[i].name if named else f"victim {i + 1}" for i in range(part.n)] for name, part in sets.items()
    }


def _exact(images: Sequence[ExactImage], victims: dict[str, list[str]]) -> list[dict[str, str]]:
    """The victims recovered exactly, once each: name, route and words."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    for one in images:
        if one.exact:
            named = {"victim": victims[one.set][one.victim], "route": one.route, "words": one.words}
            found.setdefault((one.set, one.victim), named)
    return list(found.values())


def _exactness(routes: Mapping[str, RouteFigures], names: list[str]) -> dict[str, list[tuple[str, bool, list[str]]]]:
    """route -> (words, whether they state an exact recovery, victims of whom they are said)."""
    found = {}
    for route, values in routes.items():
        said: dict[tuple[str, bool], list[str]] = {}
        for name, one in zip(names, values.exact or (), strict=False):
            said.setdefault((one.words, one.exact), []).append(name)
        found[route] = [(words, exact, who) for (words, exact), who in said.items()]
    return found


def _groups(rows: list[Row], count: int) -> list[tuple[range, list[Row]]]:
    """(victims, rows): all rows for each victim alone where there are few, else for groups that fit a page."""
    shown, size = min(count, MAX_VICTIMS), 1 if count <= FEW else COLUMNS
    return [(range(first, min(first + size, shown)), rows) for first in range(0, shown, size)]


def _labels(part: SetReport) -> dict[str, list[int]]:
    """route -> the labels that it used or found; `true`: the private images'."""
    found = {one.route: one.labels.tolist() for one in part.reconstructions if one.labels is not None}
    return found if part.labels is None else {"true": part.labels.tolist(), **found}


def _grouped_facts(adapters: Sequence[AdapterFacts]) -> list[tuple[list[str], AdapterFacts]]:
    """(names, facts): adapters of which the same is said share one entry."""
    groups: dict[AdapterFacts, tuple[list[str], AdapterFacts]] = {}
    for facts in adapters:
        groups.setdefault(replace(facts, name=""), ([], facts))[0].append(facts.name)
    return list(groups.values())

"""Pages of studies: page.md for each study, and studies.html, one self-contained page with all of them."""

from __future__ import annotations

import base64
import re
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from r2f_ext.audit.html import templates_of
from r2f_ext.audit.names import counted
from r2f_ext.audit.record import public_name
from r2f_ext.files import write_text
from r2f_ext.studies.result import StudyResult
from r2f_ext.studies.table import Row, Table

ASSETS = Path(__file__).parent / "assets"
MARKDOWN, HTML = "page.md.j2", "studies.html.j2"
LINE = 120  # columns of a line of Markdown; rows of tables are longer


def write_page(path: Path, result: StudyResult) -> None:
    """Write a study's question, conclusions, figure, method and table as Markdown; names from outside are escaped."""
    head, rows = wide(result.table)
    written = [_markdown_row(row) for row in [head, ["---"] * len(head), *rows]]
    threads = counted(int(result.environment["threads"]), "thread")
    page = _environment(MARKDOWN).get_template(MARKDOWN)
    figure, used = _figure(result), _base_and_data(result)
    write_text(path, page.render(result=result, table=written, figure=figure, base_and_data=used, threads=threads))


def write_html(path: Path, results: Sequence[StudyResult]) -> None:
    """Write all studies as one self-contained page; every name in it is escaped."""
    pictures = {}
    for result in results:
        figure = _figure(result)
        pictures[result.study.name] = None if figure is None else base64.b64encode(figure.read_bytes()).decode()
    tables = {result.study.name: wide(result.table) for result in results}
    used = {result.study.name: _base_and_data(result) for result in results}
    page = _environment(HTML).get_template(HTML).render(results=results, pictures=pictures, tables=tables, used=used)
    write_text(path, page)


def wide(table: Table) -> tuple[list[str], list[list[str]]]:
    """The table with a column for each metric: (heads, rows), a cell being `mean (low to high)`."""
    metrics = list(dict.fromkeys(row.metric for row in table))
    columns = table.columns
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in table:
        key = tuple(str(row.keys.get(name, "")) for name in columns)
        lines.setdefault(key, {})[row.metric] = row
    body = [[*key, *(_cell(found.get(metric)) for metric in metrics), _counts(found)] for key, found in lines.items()]
    return [*columns, *metrics, "n"], body


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.low is None or row.high is None:
        return f"{row.mean:.4g}"
    return f"{row.mean:.4g} ({row.low:.4g} to {row.high:.4g})"


def _counts(found: dict[str, Row]) -> str:
    """The number of values behind the means of one line: a single number if all metrics have the same."""
    return ", ".join(dict.fromkeys(str(row.n) for row in found.values()))


def _figure(result: StudyResult) -> Path | None:
    path = result.folder / "figure.png"
    return path if path.exists() else None


def _code(text: str) -> Markup:
    """The text, escaped, with the parts between backticks as `<code>`."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _base_and_data(result: StudyResult) -> str:
    """What the study ran on, as a sentence; folders by their last part only."""
    data = "; ".join(f"{d.name} ({public_name(d.private)}, {public_name(d.proxy)})" for d in result.world.data)
    seeds = ", ".join(map(str, result.seeds))
    return f"Base {public_name(result.world.base)}; private images and proxies: {data}; seeds {seeds}."


def _wrapped(text: str, first: str = "", rest: str = "") -> str:
    """Lines of at most LINE columns; none begins with characters that Markdown reads as a list item or a heading."""
    kept = re.sub(r" (?=(?:[-+#>]|\d+[.)]) )", "\N{NO-BREAK SPACE}", text)
    filled = textwrap.fill(
        kept, LINE, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return filled.replace("\N{NO-BREAK SPACE}", " ")


def _item(text: str) -> str:
    """An item of a list."""
    return _wrapped(text, "* ", "  ")


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    marks = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "`": "&#96;", "*": "&#42;", "[": "&#91;"}
    return "".join(marks.get(character, character) for character in text)


@cache
def _environment(template: str) -> jinja2.Environment:
    environment = templates_of(ASSETS, autoescape=template == HTML)
    environment.filters |= {"plain": _plain, "wrapped": _wrapped, "item": _item, "code": _code}
    return environment

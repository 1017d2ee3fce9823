"""The pages of studies: every figure stands in them, and names from outside are shown as they are."""

import pytest
from study_cases import Squares

from r2f_ext.studies import Data, Row, Table, World, run_study
from r2f_ext.studies.page import _code, _item, wide, write_html

HOSTILE = "<script>alert(1)</script>|`*[x](y)"


def result_of(folder, **world):
    return run_study(Squares(), World(**world), folder)


def test_the_table_has_a_column_for_each_metric():
    rows = [
        Row({"r": 1}, "psnr_db", (20.0, 21.0), 20.0, 21.0),
        Row({"r": 1}, "cosine", (0.5,), None, None),
        Row({"r": 2, "route": "a"}, "psnr_db", (1 / 3, 1 / 3), 1 / 3, 1 / 3),
    ]
    assert wide(Table(rows)) == (
        ["r", "route", "psnr_db", "cosine", "n"],
        [["1", "", "20.5 (20 to 21)", "0.5", "2, 1"], ["2", "a", "0.3333 (0.3333 to 0.3333)", "", "2"]],
    )


def test_the_markdown_page_has_question_conclusion_figure_method_and_every_row(tmp_path):
    result = result_of(tmp_path)
    page = (tmp_path / "squares" / "page.md").read_text()
    for said in ("How fast do squares grow?", *result.sentences(), "![", Squares.method, "r2f study squares --out DIR"):
        assert said in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(wide(result.table)[1])
    assert len({line.count("|") for line in lines}) == 1


def test_the_html_page_loads_nothing_and_has_every_study(tmp_path):
    result = result_of(tmp_path)
    write_html(tmp_path / "studies.html", [result])
    page = (tmp_path / "studies.html").read_text()
    assert "data:image/png;base64," in page and "How fast do squares grow?" in page
    assert "http" not in page and "<script" not in page


@pytest.mark.parametrize("kind", ["md", "html"])
def test_names_from_outside_are_escaped(tmp_path, kind):
    result = result_of(tmp_path, data=(Data(HOSTILE, "embedded", "embedded"),))
    write_html(tmp_path / "studies.html", [result])
    page = (tmp_path / ("studies.html" if kind == "html" else "squares/page.md")).read_text()
    assert "<script>" not in page
    if kind == "md":
        assert "[x](y)" not in page


def test_a_study_without_a_figure_has_a_page(tmp_path):
    class Bare(Squares):
        panels = ()

    run_study(Bare(), World(), tmp_path)
    assert "![" not in (tmp_path / "squares" / "page.md").read_text()


def test_backticks_become_code_and_the_rest_is_escaped():
    assert _code("`a<b` & `c`") == "<code>a&lt;b</code> &amp; <code>c</code>"


def test_lines_are_short_and_none_begins_an_item_of_its_own():
    text = " ".join(f"the loss is 1 - cos of {i} and 2. + 3 # 4 > 5 * 6" for i in range(40))
    lines = _item(text).splitlines()
    assert max(map(len, lines)) <= 120 and len(lines) > 5
    assert lines[0].startswith("* the loss") and all(line.startswith("  ") for line in lines[1:])
    assert not any(line.lstrip()[:2] in ("- ", "+ ", "# ", "> ") or line.startswith("  2. ") for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == f"* {text}"

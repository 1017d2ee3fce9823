"""The figures of studies: lines over numbers, bars over words, the intervals of the rows, and nothing without rows."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from r2f_ext.studies import Panel, Row, Table
from r2f_ext.studies.figure import _draw, _with_x, write_figure


def row(mean, half=0.5, **keys):
    return Row(keys, "psnr_db", (mean - half, mean + half), mean - half, mean + half)


def drawn(panel, rows):
    axes = Figure().add_subplot()
    _draw(axes, panel, rows)
    return axes


def test_numbers_are_joined_in_their_order_whatever_the_order_of_the_rows():
    axes = drawn(Panel("psnr_db", "r"), [row(3.0, r=4), row(1.0, r=1), row(2.0, r=2)])
    (line,) = axes.lines
    assert line.get_xdata().tolist() == [1, 2, 4]
    assert line.get_ydata().tolist() == [1, 2, 3]


def test_the_shaded_band_is_the_interval():
    axes = drawn(Panel("psnr_db", "r"), [row(1.0, r=1), row(2.0, 0.25, r=2)])
    ((vertices,),) = ([path.vertices for path in collection.get_paths()] for collection in axes.collections)
    assert vertices[:, 1].min() == 0.5
    assert vertices[:, 1].max() == 2.25


def test_words_become_bars_with_error_bars():
    axes = drawn(Panel("psnr_db", "route", ("set",)), [row(3.0, route="a", set="x"), row(1.0, route="b", set="x")])
    assert [patch.get_height() for patch in axes.patches] == [3.0, 1.0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b"]


def test_series_have_a_legend_and_a_single_one_has_none():
    two = [row(1.0, r=1, route="a"), row(2.0, r=1, route="b")]
    assert [t.get_text() for t in drawn(Panel("psnr_db", "r", ("route",)), two).get_legend().get_texts()] == ["a", "b"]
    assert drawn(Panel("psnr_db", "r"), two[:1]).get_legend() is None


def test_booleans_are_words():
    axes = drawn(Panel("psnr_db", "known"), [row(1.0, known=True), row(2.0, known=False)])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["True", "False"]


def test_a_row_without_an_interval_has_a_band_of_no_width():
    axes = drawn(Panel("psnr_db", "r"), [Row({"r": 1}, "psnr_db", (2.0,), None, None)])
    assert axes.collections[0].get_paths()[0].vertices[:, 1].tolist().count(2.0) > 0


def test_panels_without_rows_are_left_out(tmp_path):
    path = tmp_path / "figure.png"
    write_figure(path, [Panel("cosine", "r")], Table([row(1.0, r=1)]))
    assert not path.exists()
    write_figure(path, [Panel("cosine", "r"), Panel("psnr_db", "r", where={"r": (1, 2)})], Table([row(1.0, r=1)]))
    with Image.open(path) as image:
        assert image.size[0] == pytest.approx(6.2 * 110, abs=1)
        assert np.asarray(image).std() > 0


def test_lines_mark_levels():
    axes = drawn(Panel("psnr_db", "r", lines={2.5: "the mean image"}), [row(1.0, r=1)])
    assert "the mean image" in [text.get_text() for text in axes.texts]


def test_a_panel_of_two_metrics_places_points_by_the_second():
    rows = [
        Row({"x": 1, "kind": "a"}, "leak", (0.5,), None, None),
        Row({"x": 1}, "accuracy", (0.7, 0.9), 0.7, 0.9),
        Row({"x": 2, "kind": "a"}, "leak", (0.2,), None, None),
    ]
    (found,) = _with_x("accuracy", [rows[0], rows[2]], Table(rows))
    assert found.keys == {"x": 1, "kind": "a", "accuracy": pytest.approx(0.8)}
    assert found.values == (0.5,)

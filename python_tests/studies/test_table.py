"""Tables of figures: means, intervals against an independent bootstrap, choice of rows, CSV."""

import csv
import io
import json

import numpy as np
import pytest

from r2f_ext.studies import Row, Table
from r2f_ext.studies.table import difference


def cell(setting, seed, *measured):
    """A cell of a record, as JSON gives it back."""
    keys = ("metric", "values", "labels")
    made = {"setting": setting, "seed": seed, "measured": [dict(zip(keys, each, strict=True)) for each in measured]}
    return json.loads(json.dumps(made))


@pytest.fixture
def table():
    cells = [
        cell({"steps": s, "optimizer": o}, seed, ("psnr_db", [s + seed, s + 2.0 * seed], {"route": "matching"}))
        for seed in (0, 1)
        for o in ("sgd", "adamw")
        for s in (10, 2)
    ]
    cells.append(cell({"steps": 10, "optimizer": "sgd"}, 0, ("seconds", [1.5], {})))
    return Table.of(cells)


def test_seeds_of_a_setting_are_pooled_and_rows_keep_the_order_of_the_settings(table):
    assert [(row.keys["steps"], row.keys["optimizer"], row.metric) for row in table] == [
        (10, "sgd", "psnr_db"),
        (2, "sgd", "psnr_db"),
        (10, "adamw", "psnr_db"),
        (2, "adamw", "psnr_db"),
        (10, "sgd", "seconds"),
    ]
    first = table.rows[0]
    assert first.values == (10.0, 10.0, 11.0, 12.0) and first.n == 4 and first.mean == 10.75
    assert table.columns == ["steps", "optimizer", "route"]


def test_cells_in_another_order_give_the_same_figures():
    """A resumed run finds the cells of a later seed before those of an earlier setting."""
    one = [cell({"b": b}, seed, ("cosine", [b + seed], {})) for seed in (0, 1) for b in (1, 2)]
    two = [one[1], one[0], one[3], one[2]]
    rows = [{json.dumps(dict(row.keys)): (row.values, row.low, row.high) for row in Table.of(c)} for c in (one, two)]
    assert rows[0] == rows[1]


def test_the_interval_is_that_of_a_bootstrap_of_the_mean():
    values = np.random.default_rng(5).normal(20, 3, 24)
    (row,) = Table.of([cell({}, 0, ("psnr_db", values.tolist(), {}))])
    drawn = np.random.default_rng(6).integers(0, len(values), (20000, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    assert row.low == pytest.approx(low, abs=0.1) and row.high == pytest.approx(high, abs=0.1)
    assert row.low < row.mean < row.high
    assert Table.of([cell({}, 0, ("psnr_db", values.tolist(), {}))]).rows[0].low == row.low


@pytest.mark.parametrize("values", [[3.0], [1.0, float("inf")], [1.0, float("nan")]])
def test_without_two_finite_values_there_is_no_interval(values):
    (row,) = Table.of([{"setting": {}, "seed": 0, "measured": [{"metric": "m", "values": values, "labels": {}}]}])
    assert (row.low, row.high) == (None, None)
    assert "interval" not in row.words()


def test_equal_values_have_an_interval_of_no_width():
    (row,) = Table.of([cell({}, 0, ("m", [2.0, 2.0, 2.0], {}))])
    assert (row.low, row.high) == (2.0, 2.0)
    assert row.words(2) == "2.00 (2.00 to 2.00; n = 3)"


def test_rows_are_chosen_by_metric_and_keys(table):
    assert [row.keys["steps"] for row in table.where("psnr_db", optimizer="adamw")] == [10, 2]
    assert len(table.where("psnr_db", steps=(2, 10), optimizer="sgd")) == 2
    assert table.where("psnr_db", layer="qkv") == [] and table.one("psnr_db", steps=7) is None
    assert table.one("seconds", steps=10).mean == 1.5
    assert table.one("seconds", route="matching") is None  # a row without that column does not match


def test_the_csv_reads_back(table):
    read = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert len(read) == len(table.rows)
    for line, row in zip(read, table, strict=True):
        assert {name: line[name] for name in table.columns} == {n: str(row.keys.get(n, "")) for n in table.columns}
        assert (line["metric"], int(line["n"])) == (row.metric, row.n)
        assert float(line["mean"]) == pytest.approx(row.mean, rel=1e-5)
        assert line["low"] == "" if row.low is None else float(line["low"]) == pytest.approx(row.low, rel=1e-5)


def test_a_name_with_commas_and_quotes_survives_the_csv():
    text = Table.of([cell({"name": 'a, "b"\nc'}, 0, ("m", [1.0], {}))]).to_csv()
    assert next(csv.DictReader(io.StringIO(text)))["name"] == 'a, "b"\nc'


def test_a_difference_is_taken_victim_by_victim():
    one, two = (Row({"r": name}, "psnr_db", values, None, None) for name, values in (("a", (3.0, 9.0)), ("b", (1, 8))))
    found = difference(one, two)
    assert found.values == (2.0, 1.0) and found.keys == {"r": "a"} and (found.low, found.high) == (1.0, 2.0)
    assert difference(one, Row({}, "psnr_db", (1.0,), None, None)) is None

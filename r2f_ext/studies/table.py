"""The figures of a study: one row for each setting, label and metric, with mean and interval over victims."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from r2f_ext.audit.metrics import mean_interval

Value = str | int | float | bool


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        keys: column -> value, of the setting and of the labels.
        metric: with its unit.
        values: [n], of all victims and seeds.
        low, high: 95 % interval of the mean by the bootstrap over these values (percentiles; Davison and Hinkley 1997,
            section 5.3); None for fewer than two values.
    """

    keys: Mapping[str, Value]
    metric: str
    values: tuple[float, ...]
    low: float | None
    high: float | None

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def positive(self) -> bool:
        """Whether the interval lies above 0."""
        return self.low is not None and self.low > 0

    def words(self, digits: int = 1) -> str:
        """Mean, 95 % interval and number of values for a sentence: `21.3 (20.1 to 22.4; n = 16)`."""
        mean, *ends = (_fixed(value, digits) for value in (self.mean, self.low, self.high) if value is not None)
        return f"{mean} ({' to '.join(ends)}; n = {self.n})" if ends else mean


class Table:
    """All rows of a study, in the order of the settings."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)

    @classmethod
    def of(cls, cells: Sequence[Mapping[str, Any]]) -> Table:
        """From the cells of a record: each has `setting`, `seed`, and `measured` with metric, values and labels."""
        found: dict[str, tuple[dict[str, Value], str, list[float]]] = {}
        for cell in cells:
            for one in cell["measured"]:
                keys = {**cell["setting"], **one["labels"]}
                key = json.dumps([keys, one["metric"]])
                found.setdefault(key, (keys, one["metric"], []))[2].extend(map(float, one["values"]))
        return cls([Row(keys, metric, tuple(values), *_interval(values)) for keys, metric, values in found.values()])

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of all key columns, in the order of their first use."""
        return list(dict.fromkeys(name for row in self.rows for name in row.keys))

    def where(self, metric: str, **keys: Value | tuple[Value, ...]) -> list[Row]:
        """Rows of a metric whose keys have these values; a tuple allows several."""
        return [row for row in self.rows if row.metric == metric and all(_holds(row, *each) for each in keys.items())]

    def one(self, metric: str, **keys: Value) -> Row | None:
        """The first such row; None where there is none, as after a quick run or a failed cell."""
        return next(iter(self.where(metric, **keys)), None)

    def change(self, row: Row, **other: Value) -> Row | None:
        """`row` minus the row with these other keys, victim by victim; None where there is no such row."""
        base = self.one(row.metric, **{**row.keys, **other})
        return None if base is None else difference(row, base)

    def to_csv(self) -> str:
        """One line a row: the key columns, then metric, n, mean, low, high."""
        text, columns = io.StringIO(), self.columns
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*columns, "metric", "n", "mean", "low", "high"])
        for row in self.rows:
            figures = [f"{row.mean:.6g}", *("" if v is None else f"{v:.6g}" for v in (row.low, row.high))]
            writer.writerow([*(row.keys.get(name, "") for name in columns), row.metric, row.n, *figures])
        return text.getvalue()


def difference(row: Row, other: Row) -> Row | None:
    """`row` minus `other`, value by value; both hold the same victims in the same order. None if the lengths differ."""
    if row.n != other.n:
        return None
    values = tuple(one - two for one, two in zip(row.values, other.values, strict=True))
    return Row(row.keys, row.metric, values, *_interval(values))


def _holds(row: Row, name: str, wanted: Value | tuple[Value, ...]) -> bool:
    allowed = wanted if isinstance(wanted, tuple) else (wanted,)
    return name in row.keys and row.keys[name] in allowed


def _interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    if len(values) < 2 or not np.isfinite(values).all():
        return None, None
    if min(values) == max(values):
        return float(values[0]), float(values[0])
    return mean_interval(values, seed=0) or (None, None)


def _fixed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # the sum turns -0.0 into 0.0

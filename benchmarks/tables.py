"""Benchmark records as Markdown: losses, ratios of several processors side by side, and a table for each processor.

    python benchmarks/tables.py                          # of all records of the installed version, to the terminal
    python benchmarks/tables.py --write FILE RECORD ...  # of these records, into FILE

A record is what `pytest benchmarks --benchmark-json=RECORD` writes.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = 120  # of a line outside a table
Row = dict[str, Any]  # `extra_info` of an entry, with its group


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The rows of a record, ordered by group; entries that failed have no figures and are left out."""
    rows = [{"group": each["group"], **each["extra_info"]} for each in record["benchmarks"] if each["extra_info"]]
    return sorted(rows, key=lambda row: row["group"])


def key_of(row: Row) -> tuple[str, str, str]:
    """What a row measures, the same on every processor."""
    return row["name"], ", ".join(map(str, row["shape"])), row["dtype"]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in rows)


def ms(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def rival(row: Row, prefix: str = "") -> str:
    """The best rival and its time; with `prefix` "device_" those of the device times."""
    name = row[f"{prefix}best_rival"]
    return "" if name is None else f"{name}: {ms(row[f'{prefix}rivals_ms'][name])}"


def processor(machine: dict[str, Any]) -> str:
    """A GPU's name, or a CPU's with the instruction set of its kernels, in which CPUs of one name may differ."""
    return machine["gpu"] or ", ".join(filter(None, (machine["cpu"], machine["instructions"])))


def machine_sentence(machine: dict[str, Any]) -> str:
    kernels = "" if machine["instructions"] else "no compiled kernels, "
    where = "" if machine["gpu"] else f"{machine['threads']} threads, {kernels}"
    return (
        f"{where}torch {machine['torch']}, r2f-ext {machine['r2f_ext']}. Copy {machine['copy_GB_per_s']:.1f} GB/s; "
        f"matrix products {machine['gemm_float32_GFLOP_per_s']:.0f} GFLOP/s in float32,\n"
        f"{machine['gemm_bfloat16_GFLOP_per_s']:.0f} in bfloat16."
    )


def losses(rows: list[Row]) -> str:
    """Every row whose ratio, on the wall or on the device, is below 1."""
    lines = []
    for row in rows:
        name, shape, dtype = key_of(row)
        for prefix, clock in (("", "wall"), ("device_", "device")):
            value = row.get(f"{prefix}ratio")
            if value is not None and value < 1:
                line = f"* `{name}` [{shape}] {dtype}, {clock}: {value:.2f} ({rival(row, prefix)} ms)"
                lines.append(textwrap.fill(line, COLUMNS, subsequent_indent="  ", break_on_hyphens=False))
    count = sum(row["ratio"] is not None for row in rows)
    return "\n".join([f"Losses (ratio below 1): {len(lines)}, of {count} rows with a rival.", "", *lines]).rstrip()


def group_table(rows: list[Row]) -> str:
    """One operator on one processor; on a GPU with the columns of the device times."""
    on_device = any("device_ms" in row for row in rows)
    head = ["what", "shape", "dtype", "ours, ms", "best rival, ms", "ratio", "roofline"]
    head += ["device, ms", "best rival, ms", "ratio", "roofline"] if on_device else []
    lines = []
    for row in rows:
        line = [
            *key_of(row),
            ms(row["ours_ms"]),
            rival(row),
            ratio(row["ratio"]),
            percent(row["roofline_fraction"]),
        ]
        if "device_ms" in row:
            line += [ms(row["device_ms"]), rival(row, "device_"), ratio(row["device_ratio"])]
            line.append(percent(row["device_roofline_fraction"]))
        lines.append(line + [""] * (len(head) - len(line)))
    return table(head, lines)


def side_by_side(records: list[dict[str, Any]]) -> str:
    """Ours in milliseconds and the ratio of every row on every processor."""
    found = [{key_of(row): row for row in rows_of(record)} for record in records]
    keys = dict.fromkeys(key for rows in found for key in rows)

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        return f"{ms(row['ours_ms'])} ms" + ("" if row["ratio"] is None else f", {row['ratio']:.2f}")

    head = ["what", "shape", "dtype", *(processor(record["machine_info"]) for record in records)]
    return table(head, [[*key, *(cell(rows.get(key)) for rows in found)] for key in keys])


def by_processor(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each processor: suites that were recorded one by one are joined."""
    joined: dict[str, dict[str, Any]] = {}
    for record in records:
        name = processor(record["machine_info"])
        before = joined[name]["benchmarks"] if name in joined else []
        joined[name] = {**record, "benchmarks": [*before, *record["benchmarks"]]}
    return list(joined.values())


def document(records: list[dict[str, Any]]) -> str:
    records = by_processor(records)
    parts = ["# Benchmarks", "Written by `python benchmarks/tables.py`; [what the figures mean](../../README.md)."]
    if len(records) > 1:
        parts += ["## Side by side", "Time of ours, and the best rival's time over it.", side_by_side(records)]
    for record in records:
        rows = rows_of(record)
        parts += [f"## {processor(record['machine_info'])}", machine_sentence(record["machine_info"]), losses(rows)]
        for group, of_group in groupby(rows, key=lambda row: row["group"]):
            parts += [f"### {group}", group_table(list(of_group))]
    return "\n\n".join(parts) + "\n"


def default_records() -> list[Path]:
    """The records of the installed version: of all suites, or of one each."""
    import r2f_ext  # imported only here: a table of named files does not need it

    folder = RESULTS / r2f_ext.__version__
    return sorted(path for suite in ("ops", "pairs") for path in folder.glob(f"*-{suite}.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=Path, metavar="RECORD")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    paths = options.records or default_records()
    if not paths:
        parser.error("there is no record: run `make bench` first, or name one.")
    text = document([json.loads(path.read_text()) for path in paths])
    if options.write is None:
        print(text, end="")
    else:
        options.write.write_text(text)


if __name__ == "__main__":
    main()

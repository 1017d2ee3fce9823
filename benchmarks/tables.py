"""The results of a run as Markdown tables, for README.md.

python benchmarks/tables.py [benchmarks/results/latest.json]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

LATEST = Path(__file__).resolve().parent / "results" / "latest.json"
Row = dict[str, Any]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in rows)


def operator_of(row: Row) -> str:
    return row["name"].replace(",", " ").split()[0]


def is_grid(row: Row) -> bool:
    """The sweep of lora_grad over ranks makes a table of its own."""
    return row["name"].startswith("lora_grad r=") and row["name"].endswith(tuple("0123456789"))


def rank_table(rows: list[Row]) -> str:
    """Ratios by shape and rank, of one dtype."""
    ratios = {(tuple(row["shape"]), int(row["name"].partition("=")[2])): row["ratio"] for row in rows}
    shapes, ranks = dict.fromkeys(s for s, _ in ratios), sorted({r for _, r in ratios})
    head = ["P, N, d_in, d_out", *(f"r={r}" for r in ranks)]
    lines = [
        [", ".join(map(str, s)), *(f"{ratios[s, r]:.2f}" if (s, r) in ratios else "" for r in ranks)] for s in shapes
    ]
    return table(head, lines)


def full_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        bound = row["roofline_fraction"]
        shape = ", ".join(map(str, row["shape"]))
        ours, rival = f"{row['ours_ms']:.3g}", f"{row['baseline']}: {row['baseline_ms']:.3g}"
        ratio = f"{row['ratio']:.2f}"
        lines.append(
            [row["name"], shape, row["dtype"], ours, rival, ratio, "" if bound is None else f"{100 * bound:.0f} %"]
        )
    return table(["what", "shape", "dtype", "ours, ms", "best rival, ms", "ratio", "of roofline"], lines)


def document(record: dict[str, Any]) -> str:
    machine, rows = record["machine"], record["rows"]
    losses = sum(row["ratio"] < 1 for row in rows)
    what = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['instructions']}"
    parts = [
        f"{what}; torch {machine['torch']}; copy {machine['copy_GB_per_s']:.1f} GB/s, matrix products "
        f"{machine['gemm_float32_GFLOP_per_s']:.0f} GFLOP/s in float32 and "
        f"{machine['gemm_bfloat16_GFLOP_per_s']:.0f} in bfloat16. Of {len(rows)} rows {losses} are losses (ratio < 1)."
    ]
    for name, group in groupby(rows, operator_of):
        of_operator = list(group)
        grid = [row for row in of_operator if is_grid(row) and row["dtype"] == "float32"]
        parts.append(f"### `{name}`")
        if grid:
            parts += ["Plain PyTorch's time over ours, float32, B = 0:", rank_table(grid)]
        parts.append(full_table([row for row in of_operator if row not in grid or row["name"] == "lora_grad r=8"]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(document(json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else LATEST).read_text())))

"""The curve "share found against time" of the recorded Gauss-Newton searches, as a PNG.

    python benchmarks/inversion/found_over_time.py --png docs/found-over-time.png

Reads gauss_newton_new.json, gauss_newton_cpu.json and gauss_newton_cases.json in --results. A victim is found at the
end of its search if its image has 40 dB or more. The time is that of a search on the CPU, without start and bound.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[1] / "results" / "0.1.0"
FOUND_DB = 40
MINUTES = 9  # the longest search of these records ends within them
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")  # Okabe and Ito's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--png", type=Path, required=True)
    options = parser.parse_args()
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for (name, rows), colour in zip(searches(options.results).items(), COLOURS, strict=True):
        minutes, shares = curve(rows)
        axes.step(minutes, shares, where="post", color=colour, linewidth=1.6, label=f"{name} ({len(rows)})")
    axes.set(xlim=(0, MINUTES), ylim=(0, 1), xlabel="minutes of a search", ylabel=f"share at {FOUND_DB} dB or more")
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), title="victims")
    figure.savefig(options.png, dpi=110, metadata={"Software": None})


def searches(results: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each kind of victim, from the starts of an attacker."""
    records = {"present search": "gauss_newton_new.json", "one SGD step, r = 8": "gauss_newton_cpu.json"}
    found = {name: json.loads((results / file).read_text())["rows"] for name, file in records.items()}
    for row in json.loads((results / "gauss_newton_cases.json").read_text())["rows"]:
        found.setdefault(row["case"], []).append(row)
    return found


def curve(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Minutes, from 0 to the end of the longest search, and the share of the victims that is found within each."""
    ends = sorted(row["seconds"] / 60 for row in rows if row["psnr_db"] >= FOUND_DB)
    shares = [count / len(rows) for count in range(len(ends) + 1)]
    return [0.0, *ends, max(row["seconds"] for row in rows) / 60], [*shares, shares[-1]]


if __name__ == "__main__":
    main()

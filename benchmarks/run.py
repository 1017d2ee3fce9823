"""Run the benchmarks one after another and keep their results.

    python benchmarks/run.py [--device cuda [--cold-l2]] [--json FILE]          (or: make bench)

Writes benchmarks/results/latest.json: the machine, and a list of rows {name, shape, dtype, device, ours_ms, baseline,
baseline_ms, ratio, roofline_fraction}, medians, ratio = baseline over ours. Nothing else should compute meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine, options

HERE = Path(__file__).resolve().parent


def main() -> int:
    asked = options(__doc__)
    out = Path(asked.json or HERE / "results" / "latest.json")
    passed_on = ["--device", asked.device, *(["--cold-l2"] if asked.cold_l2 else [])]
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(asked.device), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "rows.json"
        for script in sorted(HERE.glob("*/bench_*.py")):
            print(f"== {script.relative_to(HERE)}", flush=True)
            code = subprocess.call([sys.executable, str(script), *passed_on, "--json", str(part)])
            if code:
                return code
            record["rows"] += json.loads(part.read_text())
            out.write_text(json.dumps(record, indent=1) + "\n")  # after each script: a later one may fail
    print(f"{len(record['rows'])} rows in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

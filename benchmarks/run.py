"""Run the CPU benchmarks one after another and keep their results.

    python benchmarks/run.py          (or: make bench)

Writes benchmarks/results/VERSION/cpu-NAME.json. Nothing else should compute meanwhile.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from r2f_ext import __version__

HERE = Path(__file__).resolve().parent
SCRIPTS = {"lora_grad": "ops/bench_lora_grad.py", "pairs": "pairs/bench_pairs.py"}


def main() -> int:
    results = HERE / "results" / __version__
    results.mkdir(parents=True, exist_ok=True)
    for name, script in SCRIPTS.items():
        print(f"== {name}", flush=True)
        code = subprocess.call([sys.executable, str(HERE / script), "--json", str(results / f"cpu-{name}.json")])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

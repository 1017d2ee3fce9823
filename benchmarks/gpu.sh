#!/usr/bin/env bash
# Everything that only a GPU can tell, in one run: all tests, compute-sanitizer on the kernel tests, benchmarks.
#   benchmarks/gpu.sh [FOLDER FOR THE RESULTS]       (default benchmarks/results)
# Needs a GPU, the CUDA toolkit, and r2f-ext installed with R2F_BUILD=cuda in the Python that runs (PYTHON=...).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
mkdir -p "$out"

"$python" -c "
import sys, torch
from r2f_ext.ops import backend_of
from r2f_ext.ops.schemas import SCHEMAS
if not torch.cuda.is_available():
    sys.exit('gpu.sh: torch sees no GPU here.')
without = [op for op in SCHEMAS if backend_of(op, 'cuda') != 'cuda']
if without:
    sys.exit(f'gpu.sh: no CUDA kernel for {without}: install with R2F_BUILD=cuda.')
name = torch.cuda.get_device_name().lower().replace(' ', '-')
open('$out/.device', 'w').write(name)
"
device=$(cat "$out/.device")
rm "$out/.device"

"$python" -m pytest -q -m "" python_tests 2>&1 | tee "$out/$device-tests.txt"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q python_tests/ops -k "cuda and not compile" 2>&1 | tail -n 20 | tee "$out/$device-$tool.txt"
  done
else
  echo "gpu.sh: compute-sanitizer is not on the PATH: left out."
fi
"$python" benchmarks/run.py --device cuda --json "$out/$device-warm.json"
"$python" benchmarks/run.py --device cuda --cold-l2 --json "$out/$device-cold.json"

#!/usr/bin/env bash
# Everything that only a GPU can tell: all tests, compute-sanitizer on the kernels' tests, benchmarks.
#   benchmarks/gpu.sh [FOLDER FOR THE RESULTS [STEP ...]]
# FOLDER: benchmarks/results unless given. STEP: tests, memcheck, racecheck, warm, cold; all of them unless given (where
# one call's time is short, one after another). A step that fails does not stop the next ones; the exit status says so.
# Needs a GPU, the CUDA toolkit, and r2f-ext installed with R2F_BUILD=cuda in the Python that runs (PYTHON=...).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:-benchmarks/results}
shift || true
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(tests memcheck racecheck warm cold)
python=${PYTHON:-python3}
mkdir -p "$out"

device=$("$python" -c "
import sys, torch
from r2f_ext.ops import backend_of
from r2f_ext.ops.schemas import SCHEMAS
if not torch.cuda.is_available():
    sys.exit('gpu.sh: torch sees no GPU here.')
without = [op for op in SCHEMAS if backend_of(op, 'cuda') != 'cuda']
if without:
    sys.exit(f'gpu.sh: no CUDA kernel for {without}: install with R2F_BUILD=cuda.')
print(torch.cuda.get_device_name().lower().replace(' ', '-'))
") || exit 1

# The kernels' tests on the GPU; what compiles is torch's own code, and slow under a sanitizer.
sanitizer() { # TOOL, SELECTION OF TESTS
  command -v compute-sanitizer > /dev/null || { echo "gpu.sh: compute-sanitizer is not on the PATH"; return 1; }
  compute-sanitizer --tool "$1" --error-exitcode 1 "$python" -m pytest -q -p no:cacheprovider python_tests/ops -k "$2" 2>&1 |
    tail -n 20 | tee "$out/$device-$1.txt"
}

step() {
  case $1 in
    tests) "$python" -m pytest -q -m "" python_tests 2>&1 | tee "$out/$device-tests.txt" ;;
    # Every tensor in memory of its own, so that a step beyond one is seen; a CUDA graph cannot be captured that way.
    memcheck) PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitizer memcheck "cuda and not compile and not graph" ;;
    racecheck) sanitizer racecheck "cuda and not compile" ;;
    warm) "$python" benchmarks/run.py --device cuda --json "$out/$device-warm.json" ;;
    cold) "$python" benchmarks/run.py --device cuda --cold-l2 --json "$out/$device-cold.json" ;;
    *) echo "gpu.sh: no step $1"; return 1 ;;
  esac
}

failed=()
for name in "${steps[@]}"; do
  echo "== $name"
  step "$name" || failed+=("$name")
done
[ ${#failed[@]} -eq 0 ] && echo "gpu.sh: all well" && exit 0
echo "gpu.sh: failed: ${failed[*]}"
exit 1

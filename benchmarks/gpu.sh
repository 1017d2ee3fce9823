#!/usr/bin/env bash
# What only a GPU can show: the tests, compute-sanitizer on the kernels' tests, the benchmarks.
#   benchmarks/gpu.sh [FOLDER FOR THE RESULTS [STEP ...]]
# FOLDER: benchmarks/results/<version> unless given. STEP: ops, pipeline, memcheck, racecheck, bench-ops, bench-pairs,
# tables; all of them unless given. A step ends within LIMIT seconds (540). A step that fails does not stop the next
# ones; the exit status tells. memcheck and racecheck run one process for each test file, side by side.
# Needs a GPU, the CUDA toolkit, pytest-benchmark, and r2f-ext installed with R2F_BUILD=cuda in the Python that runs
# (PYTHON=...). That installation is what is tested: -P keeps the source folder, which has no kernels, off the path.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
limit=${LIMIT:-540}

version_and_device=$("$python" -P -c "
import sys
sys.path.insert(0, 'benchmarks')
import torch
from measure import RESULTS, record_path
from r2f_ext.ops import backend_of, build_information
from r2f_ext.ops.schemas import SCHEMAS
if not torch.cuda.is_available():
    sys.exit('gpu.sh: torch finds no GPU on this machine.')
without = [op for op in SCHEMAS if backend_of(op, 'cuda') != 'cuda']
if without:
    why = build_information().get('why_not_loaded', 'built without CUDA')
    sys.exit(f'gpu.sh: no CUDA kernel for {without} ({why}): install with R2F_BUILD=cuda.')
path = record_path('cuda')
print(path.parent.relative_to(RESULTS.parents[1]), path.name.removesuffix('-ops.json'))
") || exit 1
read -r folder device <<< "$version_and_device"
out=${1:-$folder}
shift || true
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(ops pipeline memcheck racecheck bench-ops bench-pairs tables)
mkdir -p "$out"

tests() { # NAME, ARGUMENTS OF PYTEST
  timeout "$limit" "$python" -P -m pytest -q -m "" -p no:cacheprovider "${@:2}" 2>&1 | tee "$out/$device-$1.txt"
}

# The tests that run kernels on the GPU. torch's own compiler is left out: slow under a sanitizer, and not ours.
sanitizer() { # TOOL, SELECTION OF TESTS
  command -v compute-sanitizer > /dev/null || { echo "gpu.sh: compute-sanitizer is not on the PATH"; return 1; }
  local file pids=() status=0 index=0 files=(python_tests/ops/test_*.py)
  for file in "${files[@]}"; do
    OMP_NUM_THREADS=1 timeout "$limit" compute-sanitizer --tool "$1" --error-exitcode 1 \
      "$python" -P -m pytest -q -p no:cacheprovider "$file" -k "$2" \
      > "$out/$device-$1-$(basename "$file" .py).txt" 2>&1 &
    pids+=($!)
  done
  for file in "${files[@]}"; do
    wait "${pids[index]}"
    case $? in
      0) echo "$1 $file: no error" ;;
      5) echo "$1 $file: no test selected" ;;
      124) echo "$1 $file: not done after $limit s, see $out"; status=1 ;;
      *) echo "$1 $file: failed, see $out"; status=1 ;;
    esac
    index=$((index + 1))
  done
  return $status
}

bench() { # FOLDER OF THE SUITE
  timeout "$limit" "$python" -P -m pytest "benchmarks/$1" --device cuda -p no:cacheprovider \
    --benchmark-json="$out/$device-$1.json" 2>&1 | tee "$out/$device-$1.txt"
}

step() {
  case $1 in
    ops) tests ops python_tests/ops ;;
    pipeline) tests pipeline python_tests --ignore=python_tests/ops ;;
    # Every tensor gets an allocation of its own, so that an access beyond it is seen. This rules out CUDA graphs.
    memcheck) PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitizer memcheck "cuda and not compile and not graph" ;;
    racecheck) sanitizer racecheck "cuda and not compile and not graph" ;;
    bench-ops) bench ops ;;
    bench-pairs) bench pairs ;;
    tables) "$python" -P benchmarks/tables.py --write "$out/$device.md" "$out/$device"-{ops,pairs}.json ;;
    *) echo "gpu.sh: there is no step $1"; return 1 ;;
  esac
}

failed=()
for name in "${steps[@]}"; do
  echo "== $name"
  step "$name" || failed+=("$name")
done
[ ${#failed[@]} -eq 0 ] && echo "gpu.sh: all steps passed" && exit 0
echo "gpu.sh: failed: ${failed[*]}"
exit 1

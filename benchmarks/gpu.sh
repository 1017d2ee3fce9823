#!/usr/bin/env bash
# What only a GPU can show: the tests, compute-sanitizer on the kernels' tests, the benchmarks.
#   benchmarks/gpu.sh [FOLDER FOR THE RESULTS [STEP ...]]
# FOLDER: benchmarks/results/<version> unless given. STEP: ops, pipeline, memcheck, racecheck, bench-ops, bench-pairs,
# tables, pair-rates, decoder-rates, searches; all of them unless given. The last three are the scripts behind the tables
# of docs/gpu.md; searches needs Fashion-MNIST. A step ends within LIMIT seconds (540). A step that fails does not stop
# the next ones; the exit status tells. Tests run in WORKERS processes (8) where pytest-xdist is installed. memcheck and
# racecheck run python_tests/ops/test_kernels.py, one small case of each kernel, dtype and edge, one process for each
# operator.
# Needs a GPU, the CUDA toolkit, pytest-benchmark, and r2f-ext with CUDA kernels in the Python that runs (PYTHON=...):
#   from this folder       R2F_BUILD=cuda python setup.py build_ext --inplace
#   or an installed one    R2F_BUILD=cuda pip install --no-build-isolation .
# Kernels built in the folder are preferred; without them, -P keeps the source folder off the path.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
limit=${LIMIT:-540}
compgen -G "r2f_ext/_C*.so" > /dev/null && export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

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
[ ${#steps[@]} -gt 0 ] || steps=(ops pipeline memcheck racecheck bench-ops bench-pairs tables pair-rates decoder-rates
  searches)
mkdir -p "$out"

tests() { # NAME, ARGUMENTS OF PYTEST
  local workers=()
  "$python" -P -c "import xdist" 2> /dev/null && workers=(-n "${WORKERS:-8}")
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} timeout "$limit" "$python" -P -m pytest -q -m "" -p no:cacheprovider \
    "${workers[@]}" "${@:2}" 2>&1 | tee "$out/$device-$1.txt"
}

# SELECTION: what -k of pytest takes. An operator without a test in it is an error: nothing would be checked.
sanitizer() { # TOOL, SELECTION ...
  command -v compute-sanitizer > /dev/null || { echo "gpu.sh: compute-sanitizer is not on the PATH"; return 1; }
  local tool=$1 each pids=() status=0 index=0
  shift
  for each in "$@"; do
    OMP_NUM_THREADS=1 timeout "$limit" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -P -m pytest -q -p no:cacheprovider python_tests/ops/test_kernels.py -k "cuda and $each" \
      > "$out/$device-$tool-${each// /-}.txt" 2>&1 &
    pids+=($!)
  done
  for each in "$@"; do
    wait "${pids[index]}"
    case $? in
      0) echo "$tool $each: no error" ;;
      124) echo "$tool $each: not done after $limit s, see $out"; status=1 ;;
      *) echo "$tool $each: failed, see $out"; status=1 ;;
    esac
    index=$((index + 1))
  done
  return $status
}

bench() { # FOLDER OF THE SUITE
  timeout "$limit" "$python" -P -m pytest "benchmarks/$1" --device cuda -p no:cacheprovider \
    --benchmark-json="$out/$device-$1.json" 2>&1 | tee "$out/$device-$1.txt"
}

tables() { # of the suites that ran
  local records=() each
  for each in "$out/$device"-{ops,pairs}.json; do
    [ -f "$each" ] && records+=("$each")
  done
  [ ${#records[@]} -gt 0 ] || { echo "tables: run bench-ops or bench-pairs first"; return 1; }
  "$python" -P benchmarks/tables.py --write "$out/$device.md" "${records[@]}"
}

rates() { # STEP, SCRIPT, ARGUMENTS
  timeout "$limit" "$python" -P "benchmarks/$2" "${@:3}" --json "$out/$device-$1.json" 2>&1 | tee "$out/$device-$1.txt"
}

operators=("lora_grad and float32" "lora_grad and bfloat16" "test_matching and float32" "test_matching and float64"
  "test_matching and bfloat16" "test_matching and table" "test_matching and another" test_factored test_signed)

step() {
  case $1 in
    ops) tests ops python_tests/ops ;;
    pipeline) tests pipeline python_tests --ignore=python_tests/ops ;;
    # Every tensor gets an allocation of its own, so that an access beyond it is seen.
    memcheck) PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitizer memcheck "${operators[@]}" ;;
    racecheck) sanitizer racecheck "${operators[@]}" ;;
    bench-ops) bench ops ;;
    bench-pairs) bench pairs ;;
    tables) tables ;;
    pair-rates) rates "$1" pairs/on_gpu.py ;;
    decoder-rates) rates "$1" decoders/on_gpu.py ;;
    searches) rates "$1" inversion/gauss_newton.py --victims 100 --minutes 3 --device cuda ;;
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

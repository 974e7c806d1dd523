#!/usr/bin/env bash
# All that a person with a GPU needs, in one call: tests, checks, benchmarks. See docs/gpu.md.
#
#   OUT=folder PYTHON=python3 benchmarks/gpu.sh [--smoke] [tests] [moe] [kernels] [optimizer]
#
#   tests      the tests marked `gpu`
#   moe        benchmarks/gpu_moe.py: correctness on the device, then the table
#   kernels    all fast tests of the kernels, which compile them where there is a device; in the time that is left
#   optimizer  benchmarks/gpu_optimizer.py
#
# Without a part: tests moe optimizer kernels. BUDGET=525 with tests moe kernels takes under 9 minutes.
#
# --smoke: tiny sizes, on a CPU too. Results and logs go to $OUT (benchmarks/results/gpu_NAME). Needs torch, triton and lightning; pytest
# and transformers are used where they are installed. A part that fails does not stop the others; the exit code says it.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
if [[ -z ${OUT:-} ]]; then # one folder a GPU
  gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu")')
  OUT=benchmarks/results/gpu_$gpu
fi
BUDGET=${BUDGET:-1080} # seconds
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# A new one, so that what a run says about tuning does not depend on the runs before.
export LIGHTNING_MUE_CACHE="${LIGHTNING_MUE_CACHE:-$(mktemp -d)}"

smoke=()
if [[ ${1:-} == --smoke ]]; then
  smoke=(--smoke)
  shift
fi
parts=("$@")
((${#parts[@]})) || parts=(tests moe optimizer kernels)
failed=()

# part NAME SECONDS COMMAND...: runs a command for at most so long, or what is left; its output also goes to a file.
part() {
  local name=$1 limit=$2 code
  shift 2
  echo "== $name: at most $limit s of $((BUDGET - SECONDS)) s left"
  if ((limit < 5)); then
    failed+=("$name: no time was left")
    return
  fi
  timeout -k 10 "$limit" "$@" 2>&1 | tee "$OUT/gpu_$name.txt"
  code=${PIPESTATUS[0]}
  ((code == 0)) || failed+=("$name: exit code $code, see gpu_$name.txt")
}

# within SECONDS: that, or what is left.
within() { echo $(($1 < BUDGET - SECONDS ? $1 : BUDGET - SECONDS)); }

# tested NAME SECONDS ARGUMENT...: runs tests, in several processes where that is possible.
tested() {
  local name=$1 limit=$2 workers=()
  shift 2
  if ! "$PYTHON" -c 'import pytest' 2>/dev/null; then
    echo "== $name: skipped, pytest is not installed"
    return
  fi
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
  ((${#smoke[@]})) && workers=()
  part "$name" "$limit" "$PYTHON" -m pytest -q -p no:cacheprovider --continue-on-collection-errors "${workers[@]}" "$@"
}

for chosen in "${parts[@]}"; do
  case $chosen in
    tests) tested tests "$(within 80)" -m gpu tests/kernels tests/moe ;;
    moe)
      limit=$(within 400)
      part moe "$limit" "$PYTHON" benchmarks/gpu_moe.py --out "$OUT" --seconds $((limit - 25)) "${smoke[@]}"
      ;;
    kernels) tested kernels "$(within 300)" -m 'not gpu and not slow' tests/kernels ;;
    optimizer) part optimizer "$(within 300)" "$PYTHON" benchmarks/gpu_optimizer.py --out "$OUT" "${smoke[@]}" ;;
    *)
      echo "unknown part '$chosen'; choose from tests, moe, kernels, optimizer" >&2
      exit 2
      ;;
  esac
done

for report in "$OUT"/gpu_moe.md "$OUT"/gpu_optimizer.md; do
  if [[ -e $report ]]; then sed -n '/^## Targets/,$p' "$report"; fi
done
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "all parts passed in $SECONDS s"

#!/usr/bin/env bash
# One part of the checks and measurements that need a GPU, in under 8 minutes: bench/gpu_check.sh PART
#
# Needs torch, triton, transformers and pytest; no network. Peers that are importable (PYTHONPATH) are measured too.
# Results go to $OUT, else to bench/results. GPU_CHECK_SMALL=1 tries a part on the CPU with tiny shapes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [ $# -ne 1 ] || [ ! -f "bench/gpu/$1.sh" ]; then
  echo "usage: bench/gpu_check.sh PART"
  for part in bench/gpu/*.sh; do
    printf '  %-10s %s\n' "$(basename "$part" .sh)" "$(sed -n '2s/^# *//p' "$part")"
  done
  exit 2
fi

export OUT="${OUT:-$PWD/bench/results}"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"

# say TEXT: a line with the seconds so far
say() { printf '== %4d s  %s\n' "$SECONDS" "$*"; }

# part LIMIT_S COMMAND...: a failure or the end of its time is printed, and the rest goes on
failed=0
part() {
  local limit=$1 code=0
  shift
  timeout --kill-after=10 "$limit" "$@" || code=$?
  [ "$code" -eq 0 ] && return 0
  failed=1
  if [ "$code" -eq 124 ]; then say "STOPPED after $limit s: $*"; else say "FAILED with exit code $code: $*"; fi
}

# measure CASE UNTIL_S [OPTION...]: no cell begins UNTIL_S seconds after the start of the part; with GPU_CHECK_SMALL it is
# tried on the CPU
measure() {
  local bench=(-m bench "$1" --out "$OUT" "${@:3}")
  if [ -n "${GPU_CHECK_SMALL:-}" ]; then
    bench+=(--small --device cpu)
  else
    bench+=(--minutes "$("$PYTHON" -c "print(round(($2 - $SECONDS) / 60, 2))")")
  fi
  say "measure"
  part $((470 - SECONDS)) "$PYTHON" "${bench[@]}"
}

. "bench/gpu/$1.sh"
say "done"
exit "$failed"

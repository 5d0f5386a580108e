#!/usr/bin/env bash
# A day with one GPU of at least 24 GB: two calls, 10 minutes at the most. No GPU has run this yet.
#
#   bash benchmarks/gpu_day/gpu_day.sh dry      # every command on the CPU, on tiny shapes: 1 to 3 minutes
#   bash benchmarks/gpu_day/gpu_day.sh first    # environment, correctness at real size, times of the operations
#   bash benchmarks/gpu_day/gpu_day.sh second   # whole steps of LLaMA-3.2-3B of random weights, and `hlora run`
#
# PY is the Python to use, with hlora[run] installed; OUT the folder for logs. Nothing is downloaded, and nothing changes
# the card's settings. What it prints belongs into docs/performance.md.
set -u
stage=${1:-dry}
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.." || exit 1
PY=${PY:-python3}
export OUT=${OUT:-/tmp/gpu-day} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/src"
mkdir -p "$OUT"
: >"$OUT/parts.txt"
failed=0
part() { # part SECONDS NAME [--dry]: a part with its log; one that fails does not end the others
  local limit=$1 begin=$SECONDS status
  shift
  timeout -k 5 "$limit" "$PY" "$here/gpu_day.py" "$@" >"$OUT/$1.log" 2>&1
  status=$?
  [ $status = 0 ] || failed=1
  printf '%-6s status %-3s %4d s\n' "$1" $status $((SECONDS - begin)) | tee -a "$OUT/parts.txt"
  grep -v Warning "$OUT/$1.log" | tail -n 40
}
case $stage in
dry) for name in env right times steps job; do part 300 $name --dry; done ;;
first)
  part 60 env
  part 150 right
  part 150 times
  ;;
second)
  part 150 steps
  part 120 job
  ;;
*)
  echo "gpu_day.sh: expected dry, first or second, got $stage"
  exit 2
  ;;
esac
exit $failed

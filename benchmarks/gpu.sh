#!/usr/bin/env bash
# What a GPU does in stages 2 and 3, at the shapes of Gemma-3-1B and Qwen3-0.6B, with random weights and no network:
#   bash benchmarks/gpu.sh [--quick]
# Needs about 8 minutes on one H100 or H200. --quick runs the same at toy size, also on a CPU, so that nothing here rots.
# Each line of JSON goes to benchmarks/results/gpu.jsonl (or to $OUT/gpu.jsonl); a part that fails is named at the end.
# PYTHON names the interpreter, PARTS some of the parts: tests attention sft grpo sft_more grpo_more curve qwen3.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
failed=() quick=() gemma=(--shape gemma-3-1b) qwen3=(--shape qwen3-0.6b) long=(--prompt 7000 --completion 300) users=(--users 48)
stage2=(--rounds 1 --warm_up 3 --peers padded packed)
stage3=(--rounds 1 --steps 2 --compile)
if [ "${1:-}" = --quick ]; then
  quick=(--quick) gemma=() qwen3=() long=() users=()
  stage3=(--rounds 1)
fi

part() { # seconds, name, command: its JSON lines are kept, and a failure does not end the others
  local limit=$1 name=$2 started=$SECONDS
  shift 2
  [[ " ${PARTS:-$name} " == *" ${name%%:*} "* ]] || return 0
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$out/last_part.log" | grep -v '^{' | tail -n 40
  [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$name")
  grep '^{' "$out/last_part.log" | tee -a "$out/gpu.jsonl"
  echo "== $name took $((SECONDS - started)) s"
}

part 120 tests "$python" -m pytest -q -m gpu -p no:cacheprovider tests/unit/test_shared_prefix.py
part 120 attention "$python" benchmarks/attention.py "${gemma[@]}" "${long[@]}" --samples 16
part 240 sft "$python" benchmarks/sft.py "${gemma[@]}" "${users[@]}" "${stage2[@]}" "${quick[@]}" --profile "$out/profile_sft.txt"
part 200 grpo "$python" benchmarks/shared_prefix.py "${gemma[@]}" "${long[@]}" "${stage3[@]}" "${quick[@]}" --profile "$out/profile_grpo.txt"
part 100 sft_more "$python" benchmarks/sft.py "${gemma[@]}" "${users[@]}" --rounds 1 --warm_up 3 "${quick[@]}" --no_compile --peers
part 200 grpo_more "$python" benchmarks/shared_prefix.py "${gemma[@]}" "${long[@]}" "${stage3[@]}" "${quick[@]}" --checkpointing
part 200 curve "$python" benchmarks/shared_prefix.py "${gemma[@]}" "${long[@]}" "${stage3[@]}" "${quick[@]}" --prompt 1000 --curve 3000
part 200 qwen3 "$python" benchmarks/sft.py "${qwen3[@]}" "${users[@]}" "${stage2[@]}" "${quick[@]}"
rm -f "$out/last_part.log"
echo "all parts took $SECONDS s; failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]

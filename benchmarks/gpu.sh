#!/usr/bin/env bash
# What a GPU does in stages 2 and 3, at the shapes of Gemma-3-1B and Qwen3-0.6B, with random weights and no network:
#   bash benchmarks/gpu.sh [--quick]
# Needs under 8 minutes on one H100 or H200: a machine may be lent for minutes. The parts come in order of worth, each
# line is printed when it is known, and after BUDGET seconds (460) no part begins; the last line names those that it
# left out, for a second call with PARTS. --quick runs the same at toy size, also on a CPU, so that nothing here rots:
# there without compiled layers, and with the reference of the flash kernel.
# Each line of JSON goes to benchmarks/results/gpu.jsonl (or $OUT/gpu.jsonl; of --quick to a folder that is deleted).
# PYTHON names the interpreter, PARTS some of the parts:
#   sft          ours with fused layers and a profile, TRL packed on the same kernel, TRL padded as the release has it
#   grpo         a step on 7,000 + 16 x 300 tokens, ours with a profile, and TRL's
#   tests        what needs a GPU
#   paper        memory of the paper's stage 3: bnpo, 8 prompts a step, gradient checkpointing
#   sft_memory   ours with gradient checkpointing
#   qwen3        ours at Qwen3-0.6B's shape; qwen3_packed: TRL packed beside it
#   curve        the step on prompts of 1,000 and 3,000 tokens, ours and TRL's
#   grpo_memory  ours with gradient checkpointing
#   attention    the kernels alone
#   compile      ours with compiled layers
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export PYTHONUNBUFFERED=1 TRL_EXPERIMENTAL_SILENCE=1
export TORCHINDUCTOR_COMPILE_THREADS=1 TORCHINDUCTOR_VEC_ISA_OK=0  # no pool of compilers that hangs, no checks of C++
python=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
out=${OUT:-benchmarks/results} budget=${BUDGET:-460} slack=1
failed=() stopped=()
gemma=(--shape gemma-3-1b) qwen3=(--shape qwen3-0.6b) stage2=(--users 32 --peer_users 8 --warm_up 2 --rounds 1)
lengths=(--prompt 7000 --completion 300) compile=(--compile)
stage3=("${lengths[@]}" --steps 3 --rounds 1) paper=("${lengths[@]}" --accumulation 8 --steps 1 --warm_up 0)
curve=(--prompt 3000 --completion 300 --curve 1000 --steps 3 --rounds 1)
if [ "${1:-}" = --quick ]; then
  gemma=() qwen3=(--shape qwen3-small) stage2=(--quick) stage3=(--quick) lengths=() compile=()
  paper=(--quick --accumulation 2) curve=(--quick --curve 250)
  budget=${BUDGET:-9200} slack=20 # a CPU may have other work
  [ -n "${OUT:-}" ] || { out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT; }
fi
mkdir -p "$out"

keep() { # prints what it reads, and keeps its lines of JSON
  local line
  while IFS= read -r line; do
    echo "$line"
    [[ $line != '{"'* ]] || echo "$line" >>"$out/gpu.jsonl"
  done
}

part() { # seconds, name, command; a failure does not end the others
  local limit=$(($1 * slack)) name=$2 started=$SECONDS before status
  shift 2
  [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
  [ "$limit" -le $((budget - SECONDS)) ] || limit=$((budget - SECONDS))
  if [ "$limit" -lt 10 ]; then
    stopped+=("$name")
    return 0
  fi
  echo "== $name"
  before=$(cat "$out/gpu.jsonl" 2>/dev/null | wc -l)
  timeout -k 5 "$limit" "$@" 2>&1 | keep
  status=${PIPESTATUS[0]}
  if [ "$status" = 124 ] && [ "$(cat "$out/gpu.jsonl" 2>/dev/null | wc -l)" -gt "$before" ]; then
    stopped+=("$name") # what it had printed by then counts
  elif [ "$status" != 0 ]; then
    failed+=("$name")
  fi
  echo "== $name took $((SECONDS - started)) s"
}

sft=("$python" benchmarks/sft.py "${stage2[@]}") grpo=("$python" benchmarks/shared_prefix.py)
part 170 sft "${sft[@]}" "${gemma[@]}" --peers packed padded --profile "$out/profile_sft.txt"
part 110 grpo "${grpo[@]}" "${gemma[@]}" "${stage3[@]}" --profile "$out/profile_grpo.txt"
part 60 tests "$python" -m pytest -q -m gpu -p no:cacheprovider -k "not compiled" tests/unit/test_shared_prefix.py tests/unit/test_fused.py
part 100 paper "${grpo[@]}" "${gemma[@]}" "${paper[@]}" --alone --checkpointing --loss bnpo
part 60 sft_memory "${sft[@]}" "${gemma[@]}" --peers --checkpointing
part 60 qwen3 "${sft[@]}" "${qwen3[@]}" --peers
part 120 curve "${grpo[@]}" "${gemma[@]}" "${curve[@]}"
part 60 grpo_memory "${grpo[@]}" "${gemma[@]}" "${stage3[@]}" --alone --checkpointing
part 60 qwen3_packed "${sft[@]}" "${qwen3[@]}" --peers packed
part 30 attention "$python" benchmarks/attention.py "${gemma[@]}" "${lengths[@]}" --samples 16
part 180 compile "${sft[@]}" "${gemma[@]}" --peers "${compile[@]}"
echo "all parts took $SECONDS s; stopped by the clock: ${stopped[*]:-none}; failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]

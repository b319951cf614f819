#!/usr/bin/env bash
# Stage 3c: confidence-weighted GRPO -> grpo/
#   bash grpo_step2.sh [RECIPE] [--key value ...]      default recipe: recipes/tiny/grpo.yaml
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$root/recipes/tiny/grpo.yaml
case "${1:-}" in "" | --*) ;; *) recipe=$(realpath "$1"); shift ;; esac
cd "$root"
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
machine=cpu; ! nvidia-smi -L >/dev/null 2>&1 || machine=ddp
exec accelerate launch --quiet --config_file "${ACCELERATE_CONFIG:-recipes/accelerate_configs/$machine.yaml}" -m twice_rec.stages.stage3c_grpo --config "$recipe" "$@"

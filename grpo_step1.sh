#!/usr/bin/env bash
# Stage 3b: the rollout server with the stage-2 model
#   bash grpo_step1.sh [RECIPE] [--key value ...]      default recipe: recipes/tiny/grpo.yaml
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$root/recipes/tiny/grpo.yaml
case "${1:-}" in "" | --*) ;; *) recipe=$(realpath "$1"); shift ;; esac
cd "$root"
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec python -m twice_rec.stages.stage3b_serve --config "$recipe" "$@"

#!/usr/bin/env bash
# Stage 4: all variants on the test questions -> eval/
#   bash evaluate.sh [RECIPE] [--key value ...]      default recipe: recipes/tiny/evaluate.yaml
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$root/recipes/tiny/evaluate.yaml
case "${1:-}" in "" | --*) ;; *) recipe=$(realpath "$1"); shift ;; esac
cd "$root"
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec python -m twice_rec.stages.stage4_evaluate --config "$recipe" "$@"

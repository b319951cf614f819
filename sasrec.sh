#!/usr/bin/env bash
# Stage 3a: SASRec and the CF baselines -> sasrec/, eval/
#   bash sasrec.sh [RECIPE] [--key value ...]      default recipe: recipes/tiny/sasrec.yaml
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$root/recipes/tiny/sasrec.yaml
case "${1:-}" in "" | --*) ;; *) recipe=$(realpath "$1"); shift ;; esac
cd "$root"
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec python -m twice_rec.stages.stage3a_sasrec --config "$recipe" "$@"

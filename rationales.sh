#!/usr/bin/env bash
# Stage 1: rationales for training examples -> rationales/
#   bash rationales.sh [RECIPE] [--key value ...]      default recipe: recipes/tiny/rationales.yaml
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$root/recipes/tiny/rationales.yaml
case "${1:-}" in "" | --*) ;; *) recipe=$(realpath "$1"); shift ;; esac
cd "$root"
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec python -m twice_rec.stages.stage1_rationales --config "$recipe" "$@"

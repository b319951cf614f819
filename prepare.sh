#!/usr/bin/env bash
# Stage 0: a source of purchases -> data/
#   bash prepare.sh [RECIPE] [--key value ...]      default recipe: recipes/tiny/prepare.yaml
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$root/recipes/tiny/prepare.yaml
case "${1:-}" in "" | --*) ;; *) recipe=$(realpath "$1"); shift ;; esac
cd "$root"
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec python -m twice_rec.stages.stage0_prepare --config "$recipe" "$@"

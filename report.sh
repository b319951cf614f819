#!/usr/bin/env bash
# Stage 5: tables and report -> report/
#   bash report.sh [RECIPE] [--key value ...]      default recipe: recipes/tiny/report.yaml
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$root/recipes/tiny/report.yaml
case "${1:-}" in "" | --*) ;; *) recipe=$(realpath "$1"); shift ;; esac
cd "$root"
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec python -m twice_rec.stages.stage5_report --config "$recipe" "$@"

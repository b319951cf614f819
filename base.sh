#!/usr/bin/env bash
# The toy base model -> base/, assets/tiny_base (it is there already; --publish_dir null leaves it alone)
#   bash base.sh [RECIPE] [--key value ...]      default recipe: tiny_base/recipe.yaml
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$root/tiny_base/recipe.yaml
case "${1:-}" in "" | -*) ;; *) recipe=$(realpath -m -- "$1"); shift ;; esac
cd "$root"
venv=${VENV:-$root/.venv}
[ -x "$venv/bin/python" ] || { echo "error: $venv has no Python; make the environment with: bash install.sh" >&2; exit 2; }
export PATH="$venv/bin:$PATH" PYTHONPATH="$root/src:$root${PYTHONPATH:+:$PYTHONPATH}"
processes=1; nvidia-smi -L >/dev/null 2>&1 || processes=$(($(getconf _NPROCESSORS_ONLN) < 4 ? $(getconf _NPROCESSORS_ONLN) : 4))
OMP_NUM_THREADS=1 exec torchrun --nproc_per_node "$processes" -m tiny_base.stage --config "$recipe" "$@"

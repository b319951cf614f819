#!/usr/bin/env bash
# What the launchers share: runs a stage in the environment beside this file, wherever it is called from.
#   bash launch.sh STAGE DEFAULT_RECIPE [RECIPE] [--key value ...]
# Where there is a GPU, stages 2 and 3c start by `accelerate launch` with recipes/accelerate_configs/ddp.yaml;
# ACCELERATE_CONFIG names another of these files.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stage=$1 recipe=$root/$2
shift 2
case "${1:-}" in "" | -*) ;; *) recipe=$(realpath "$1"); shift ;; esac
cd "$root"
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
start=(python)
if [ "$stage" = sft ] || [ "$stage" = grpo ]; then
  config=${ACCELERATE_CONFIG:-}
  [ -n "$config" ] || ! nvidia-smi -L >/dev/null 2>&1 || config=recipes/accelerate_configs/ddp.yaml
  [ -z "$config" ] || start=(accelerate launch --quiet --config_file "$config")
fi
exec "${start[@]}" -m twice_rec "$stage" "$recipe" "$@"

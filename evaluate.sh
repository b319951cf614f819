#!/usr/bin/env bash
# Stage 4: the same test questions to every model -> eval/    bash evaluate.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" evaluate recipes/tiny/evaluate.yaml "$@"

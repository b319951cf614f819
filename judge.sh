#!/usr/bin/env bash
# Stage 4b: what the rationales of evaluated models are worth -> judge/    bash judge.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" judge recipes/tiny/judge.yaml "$@"

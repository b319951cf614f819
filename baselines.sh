#!/usr/bin/env bash
# Stage 3a: the CF models of Table 1, through RecBole -> <model>/, eval/    bash baselines.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" baselines recipes/tiny/baselines.yaml "$@"

#!/usr/bin/env bash
# Stage 5: tables with intervals and comparisons -> report/    bash report.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" report recipes/tiny/report.yaml "$@"

#!/usr/bin/env bash
# Stage 4c: an A/B test, simulated or from a log -> ab_test/    bash ab_test.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" ab_test recipes/tiny/ab_test.yaml "$@"

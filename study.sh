#!/usr/bin/env bash
# Stage 6: every variant of the paper's questions over several seeds    bash study.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" study recipes/tiny/study.yaml "$@"

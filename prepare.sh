#!/usr/bin/env bash
# Stage 0: interactions, sequences and candidate lists -> data/    bash prepare.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" prepare recipes/tiny/prepare.yaml "$@"

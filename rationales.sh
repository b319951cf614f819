#!/usr/bin/env bash
# Stage 1: rationales and their curation -> rationales/    bash rationales.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" rationales recipes/tiny/rationales.yaml "$@"

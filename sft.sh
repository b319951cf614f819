#!/usr/bin/env bash
# Stage 2: multi-task SFT -> sft/, sft/merged/    bash sft.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" sft recipes/tiny/sft.yaml "$@"

#!/usr/bin/env bash
# Stage 3a: SASRec and the CF baselines -> sasrec/, eval/    bash sasrec.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" sasrec recipes/tiny/sasrec.yaml "$@"

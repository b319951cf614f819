#!/usr/bin/env bash
# Stage 3c: confidence-weighted GRPO -> grpo/, grpo/merged/    bash grpo_step2.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" grpo recipes/tiny/grpo.yaml "$@"

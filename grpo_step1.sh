#!/usr/bin/env bash
# Stage 3b: the rollout servers with the stage-2 model    bash grpo_step1.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" serve recipes/tiny/grpo.yaml "$@"

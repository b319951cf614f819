#!/usr/bin/env bash
# Stage 2b: S-DPO on the stage-2 model, a baseline -> sft_sdpo/    bash sdpo.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" sdpo recipes/tiny/sdpo.yaml "$@"

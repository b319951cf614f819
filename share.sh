#!/usr/bin/env bash
# A model with its card and results -> share/<variant>/, and the hub    bash share.sh [RECIPE] [--key value ...]
exec bash "$(dirname "$(realpath "$0")")/launch.sh" share recipes/tiny/share.yaml "$@"

#!/usr/bin/env bash
# The whole pipeline at tiny size, on a CPU, without downloads of models or data. Run again, it redoes nothing.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"
case "$*" in
  "") ;;
  -h | --help) sed -n '2,/^set /{s/^# //p}' reproduce.sh; exit 0 ;;
  *) echo "error: reproduce.sh takes no arguments, found $*; for other settings run the launchers it calls" >&2; exit 2 ;;
esac
bash install.sh
bash prepare.sh
bash rationales.sh
bash sft.sh
bash sasrec.sh
bash grpo_step1.sh
bash grpo_step2.sh
bash evaluate.sh --variants base oracle --rankings likelihood # one greedy completion per user, not five more
bash evaluate.sh --variants stage2 stage3
bash evaluate.sh --variants stage2 --with_rationale false --suffix item_only --rankings likelihood
bash report.sh

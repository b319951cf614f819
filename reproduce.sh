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
bash evaluate.sh --variants base ceiling_text ceiling_popularity ceiling_cohort oracle --rankings likelihood
bash evaluate.sh --variants stage2 stage3 # by likelihood, and by votes of five more completions per user
bash evaluate.sh --variants stage2 stage3 --with_rationale false --suffix item_only --rankings likelihood
bash judge.sh
bash ab_test.sh
bash report.sh

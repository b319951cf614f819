#!/usr/bin/env bash
# What the launchers share: runs a stage in the environment beside this file, wherever it is called from.
#   bash launch.sh STAGE DEFAULT_RECIPE [RECIPE] [--key value ...]
# VENV names another environment than .venv. Where there is a GPU, stages 2 and 3c start by `accelerate launch` with
# recipes/accelerate_configs/ddp.yaml; ACCELERATE_CONFIG names another of these files, and ACCELERATE_FLAGS has more of
# accelerate's flags, such as "--machine_rank 1 --main_process_ip node1".
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stage=$1 recipe=$root/$2
shift 2
fail() { echo "error: $1" >&2; exit 2; }
case "${1-none}" in
  none) ;;
  "") fail "the recipe is an empty word; name one, or leave it out for ${recipe#"$root"/}" ;;
  -*) for word in "$@"; do [[ $word != *.y*ml ]] || fail "the recipe comes first: RECIPE [--key value ...], found ${1%%=*}"; done ;;
  *) recipe=$(realpath -m -- "$1"); shift ;;
esac
venv=$(realpath -m -- "${VENV:-$root/.venv}") config=${ACCELERATE_CONFIG:-}
[ ! -f "$config" ] || config=$(realpath -- "$config")
cd "$root"
[ -x "$venv/bin/python" ] || fail "$venv has no Python; make the environment with: bash install.sh"
export PATH="$venv/bin:$PATH" PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
run=(-m twice_rec "$stage" "$recipe" "$@")
case $stage in
  sft | sdpo | grpo) [ -n "$config" ] || ! nvidia-smi -L >/dev/null 2>&1 || config=recipes/accelerate_configs/ddp.yaml ;;
  sasrec) ;; # one process, unless ACCELERATE_CONFIG asks for more
  *) config= ;;
esac
[ -n "$config" ] || exec python "${run[@]}"
[ -f "$config" ] || fail "ACCELERATE_CONFIG is $config: no such file; recipes/accelerate_configs has some"
case " $* " in
  *" -h "* | *" --help "* | *" --show "*) exec python "${run[@]}" ;;
  *" --dry_run "*) ACCELERATE_CONFIG=$config exec python "${run[@]}" ;;
esac
read -ra flags <<<"${ACCELERATE_FLAGS:-}"
case " ${flags[*]} " in
  *" --machine_rank "[1-9]*) ;; # the first machine checks, and holds the results' lock
  *) python "${run[@]}" --check ;; # accelerate would follow an error by its own trace, and end with 1
esac
exec accelerate launch --quiet --config_file "$config" "${flags[@]}" "${run[@]}"

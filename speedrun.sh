#!/usr/bin/env bash
# From nothing to a chat model, on whatever this machine is. Run it again and it continues where it stopped.
#
#   bash speedrun.sh                      picks a preset: cpu-demo, single-gpu (1 to 7 GPUs) or speedrun (8 GPUs)
#   bash speedrun.sh --preset cpu-demo    says which; smoke is the test of seconds
#     --home DIR    where everything is kept (default: NANOCHAT_HOME, else the user's cache directory)
#     --tag NAME    name of the run (default: main)        --seed N     another seed
#     --dry-run     only show the plan and the commands    --no-install  take .venv as it is
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() {
    printf 'error: %s\n  hint: %s\n' "$1" "$2" >&2
    exit 2
}

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c '^GPU' || true)
preset=cpu-demo dry=no installs=yes common=() place=()
if [ "$gpus" -ge 8 ]; then preset=speedrun; elif [ "$gpus" -ge 1 ]; then preset=single-gpu; fi
while [ $# -gt 0 ]; do
    case $1 in
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    --dry-run) dry=yes ;;
    --no-install) installs=no ;;
    --preset | --home | --tag | --seed)
        [ $# -ge 2 ] || die "$1 needs a value" "write $1 VALUE"
        if [ "$1" = --preset ]; then preset=$2; else common+=("$1=$2"); fi
        if [ "$1" = --home ] || [ "$1" = --tag ]; then place+=("$1=$2"); fi
        shift
        ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *) die "there is no flag $1" "the flags are --preset --home --tag --seed --dry-run --no-install" ;;
    esac
    shift
done
case $preset in
cpu-demo | smoke) gpus=0 ;;
single-gpu | speedrun) ;;
*) die "there is no preset '$preset'" "choose one of: smoke, cpu-demo, single-gpu, speedrun" ;;
esac

python=.venv/bin/python
if [ $installs = yes ] && [ $dry = no ]; then bash dev/install.sh; fi
[ -x $python ] || python=python3
train=("$python" -m)
if [ "$gpus" -gt 1 ]; then train=("$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" -m); fi

stage() { # stage NAME COMMAND...: what a finished stage has done it does not do again; 75 means stopped and saved
    printf '\n== %s\n' "$1"
    shift
    if [ $dry = yes ]; then echo "$*" && return; fi
    local code=0
    "$@" || code=$?
    if [ $code -eq 75 ]; then echo "stopped, everything is saved: run the same command again to continue" >&2; fi
    [ $code -eq 0 ] || exit $code
}
args=(--preset="$preset" ${common[@]+"${common[@]}"})

plan=(--preset="$preset")
if [ "$gpus" -gt 0 ]; then plan+=(--gpus="$gpus"); fi
"$python" -m scripts.plan "${plan[@]}" # what, on what, how long, how much disk, what it costs

stage "tokenizer"               "$python" -m scripts.tok_train "${args[@]}"
stage "tokenizer, measured"     "$python" -m scripts.tok_eval "${args[@]}"
stage "pretraining"             "${train[@]}" scripts.base_train "${args[@]}"
stage "base model, measured"    "${train[@]}" scripts.base_eval "${args[@]}"
stage "mid-training"            "${train[@]}" scripts.mid_train "${args[@]}"
stage "fine-tuning"             "${train[@]}" scripts.chat_sft "${args[@]}"
case $preset in
cpu-demo | smoke) stage "reinforcement" "${train[@]}" scripts.chat_rl "${args[@]}" ;; # on GPUs it takes hours: by hand
esac
stage "chat model, measured"    "${train[@]}" scripts.chat_eval "${args[@]}"
stage "report"                  "$python" -m scripts.report "${args[@]}"

printf '\nTalk to it:\n'
echo "  $python -m scripts.chat_cli ${place[*]-}"
echo "  $python -m scripts.chat_web ${place[*]-}   # and open the address it prints"

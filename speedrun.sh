#!/usr/bin/env bash
# From a bare machine to a chat model: install, tokenizer, base, mid, SFT, RL, evaluation, report,
# chat.
#
#   bash speedrun.sh                          picks a profile by itself: gpu where CUDA is, else cpu
#   SPEEDRUN_PROFILE=cpu|gpu|smoke bash speedrun.sh
#   DEPTH=24 bash speedrun.sh                 gpu: the one dial (default 20)
#   bash speedrun.sh --corpus ./my_texts      your own .txt, .jsonl or .parquet files
#   SHARDS=40 bash speedrun.sh --corpus ORG/NAME   gpu: so many files of a data set on the hub
#   RL=0 bash speedrun.sh                     without the reinforcement learning at the end
#   bash speedrun.sh --corpus DIR --name NAME  tokenizer and models get this name
#
# Another corpus than the profile's own gets a tokenizer and models (tags) of its own, named after
# its folder unless --name says otherwise: what was made from other text stays as it is.
#
# Run it again after an interruption: it continues where it stopped, finished stages are not
# repeated. Everything is written under NANOCHAT_BASE_DIR (default ~/.cache/nanochat).
set -euo pipefail

here="$PWD"
cd "$(dirname "$0")"

corpus="" name=""
while [ $# -gt 0 ]; do
    case "$1" in
        --corpus) corpus="${2:?--corpus needs a folder or a name}"; shift 2 ;;
        --corpus=*) corpus="${1#*=}"; shift ;;
        --name) name="${2:?--name needs a name}"; shift 2 ;;
        --name=*) name="${1#*=}"; shift ;;
        *) echo "error: unknown argument $1; see the head of speedrun.sh" >&2; exit 2 ;;
    esac
done

# Paths are the caller's, and this script has left the caller's folder.
from_here() { case "$1" in "~" | "~/"*) echo "$HOME${1#"~"}" ;; /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
case "$corpus" in
    "" | bbe | climbmix | fineweb-edu) ;;
    *)
        path="$(from_here "$corpus")"
        if [ -e "$path" ] || [ -e "${path%:*}" ]; then corpus="$path"; fi
        if [ -z "$name" ]; then
            [ -e "$path" ] || path="${path%:*}"
            name="$(cd "$path" 2> /dev/null && basename "$PWD" || basename "$path")"
            name="$(printf %s "${name%.*}" | tr -c 'A-Za-z0-9._-' _ | sed 's/^[^A-Za-z0-9]*//')"
            name="${name:-texts}"
        fi
        ;;
esac
[ -z "${NANOCHAT_BASE_DIR:-}" ] || NANOCHAT_BASE_DIR="$(from_here "$NANOCHAT_BASE_DIR")"
[ -z "${NANOCHAT_HUB_DIR:-}" ] || NANOCHAT_HUB_DIR="$(from_here "$NANOCHAT_HUB_DIR")"
case "${PYTHON:-}" in */*) PYTHON="$(from_here "$PYTHON")" ;; esac

source scripts/setup.sh
install_into_venv

profile="${SPEEDRUN_PROFILE:-}"
if [ -z "$profile" ]; then
    profile="$(python -c '
import sys
from nanochat.errors import UserError
from nanochat.runtime import choose_device
try:
    print("gpu" if choose_device("auto").type == "cuda" else "cpu")
except UserError as error:
    remedy = str(error).replace("--device cpu", "SPEEDRUN_PROFILE=cpu")
    sys.exit(f"error: {remedy}")')"
fi
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
mkdir -p "$NANOCHAT_BASE_DIR"
own=climbmix
[ "$profile" = gpu ] || own=bbe
corpus="${corpus:-$own}"
if [ -z "$name" ]; then
    if [ "$corpus" = "$own" ]; then name=default; else name="$corpus"; fi
fi
echo "profile $profile, artifacts in $NANOCHAT_BASE_DIR"

run() { echo; echo "> $*"; "$@"; }
stages=(base mid sft)
[ "${RL:-1}" = 0 ] || stages+=(rl)

if [ "$profile" = gpu ]; then
    depth="${DEPTH:-20}"
    gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
    # A run that is told to stop saves first; torchrun would kill it after 30 seconds of that.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
    train() { run torchrun --standalone --nproc_per_node "$gpus" -m "$@"; }

    # Enough shards for the token budget of this depth; the first few suffice for the tokenizer.
    # Only of climbmix and fineweb-edu it is known how much a shard holds.
    # --keep-last 1 halves what the disk must hold: 4 stages, 9 GB a checkpoint at depth 20.
    keep=(--keep-last 1)
    vocabulary=32768  # docs/stages.md says why
    shards="$(python -m scripts.plan --depth "$depth" --gpus "$gpus" --corpus "$corpus" --tag "$name" \
        --vocab-size "$vocabulary" "${keep[@]}" --check-disk --print num_shards)"
    download=""
    if [ -z "$shards" ] || [ "$shards" = None ]; then
        shards="${SHARDS:-8}"
        if [ "$corpus" = bbe ] || [ -e "$corpus" ] || [ -e "${corpus%:*}" ]; then
            shards=0
            echo "$corpus is here: nothing to download"
        fi
    fi
    if [ "$shards" != 0 ]; then
        run python -m nanochat.data.hub "$corpus" -n "$((shards < 8 ? shards : 8))"
        python -m nanochat.data.hub "$corpus" -n "$shards" \
            > "$NANOCHAT_BASE_DIR/download.log" 2>&1 &
        download=$!
    fi
    run python -m nanochat.data.hub eval_bundle || echo "CORE will not be measured"
    run python -m scripts.tok_train --corpus "$corpus" --name "$name" --vocab-size "$vocabulary" \
        --max-chars 2000000000
    run python -m scripts.tok_eval --corpus "$corpus" --tokenizer "$name"
    if [ -n "$download" ]; then
        echo "waiting for the download of $shards shards"
        wait "$download" || { tail "$NANOCHAT_BASE_DIR/download.log" >&2; exit 1; }
    fi
    run python -m scripts.tok_encode --corpus "$corpus" --tokenizer "$name"
    train scripts.base_train --depth "$depth" --corpus "$corpus" --tokenizer "$name" --tag "$name" \
        --save-every 1000 "${keep[@]}" --resume
    train scripts.base_eval --source "base/$name" --corpus "$corpus" --resume
    train scripts.mid_train --source "base/$name" --tag "$name" --corpus "$corpus" --save-every 500 "${keep[@]}" --resume
    train scripts.chat_sft --source "mid/$name" --tag "$name" --corpus "$corpus" --save-every 500 "${keep[@]}" --resume
    if [ "${RL:-1}" != 0 ]; then
        train scripts.chat_rl --source "sft/$name" --tag "$name" --mix gsm8k --num-steps 120 \
            --prompts-per-step 32 --save-every 40 "${keep[@]}" --resume
    fi
    for stage in "${stages[@]}"; do
        train scripts.chat_eval --source "$stage/$name" --resume --task mmlu --task arc:easy --task arc:challenge \
            --task gsm8k --task humaneval --task simplespelling --task spellingbee
    done
else
    case "$profile" in
        cpu)
            vocabulary=4096 problems=256  # whole test splits
            # A small corpus of one's own would be learned by heart in so many steps.
            base=(--depth 4 --context-length 256 --num-steps 440 --max-epochs 3 --save-every 110
                --eval-every 110)
            chat=(--save-every 100 --eval-every 0)
            mid_mix=(customjson:1 identity:5500:1 simplespelling:12500:1 spellingbee:5000:1
                arithmetic:4500:level=0:1 arithmetic:1500:1 passages:4500:1 ignorance:2500:1
                followups:2200:1)
            # seed=1: other rows than those of mid-training
            sft_mix=(customjson:1 identity:2500:seed=1:1 simplespelling:3200:seed=1:1
                spellingbee:2500:seed=1:1 arithmetic:2000:level=0:seed=1:1 arithmetic:600:seed=1:1
                passages:1500:seed=1:1 ignorance:1200:seed=1:1 followups:1100:seed=1:1)
            # Harder sums than those of SFT, and all else, so that nothing gets lost on the way.
            rl=(--mix arithmetic:3000:level=2:1 arithmetic:2000:level=0:seed=2:1
                simplespelling:2000:seed=2:1 spellingbee:2000:seed=2:1 ignorance:1000:seed=2:1
                followups:1500:seed=2:1 passages:1000:seed=2:1 --num-steps 12
                --prompts-per-step 16 --max-tokens 100 --eval-problems 128 --save-every 10)
            ;;
        smoke)
            vocabulary=512 problems=4
            base=(--depth 1 --context-length 64 --num-steps 4 --save-every 2 --eval-every 2
                --eval-tokens 1024)
            chat=(--num-steps 3 --eval-every 0 --eval-tokens 1024)
            mid_mix=(customjson:1 identity:50:1 simplespelling:50:1 spellingbee:50:1
                arithmetic:50:level=0:1 arithmetic:50:1 passages:50:1 ignorance:50:1 followups:50:1)
            sft_mix=("${mid_mix[@]}")
            rl=(--mix simplespelling:50:1 spellingbee:50:1 --num-steps 2 --prompts-per-step 2
                --max-tokens 8 --eval-problems 4)
            ;;
        *) echo "error: SPEEDRUN_PROFILE=$profile; choose cpu, gpu or smoke" >&2; exit 2 ;;
    esac
    tasks=(simplespelling spellingbee arithmetic:level=0 arithmetic arithmetic:level=2 passages
        ignorance followups)

    run python -m scripts.tok_train --corpus "$corpus" --name "$name" --vocab-size "$vocabulary"
    run python -m scripts.tok_eval --corpus "$corpus" --tokenizer "$name"
    run python -m scripts.tok_encode --corpus "$corpus" --tokenizer "$name"
    small=(--tag "$name" --corpus "$corpus" --resume)
    # Small shapes: heads of 64, every layer sees the whole (short) row, 4,096 tokens a step. The
    # stages after this one take steps as large.
    run python -m scripts.base_train "${small[@]}" "${base[@]}" --tokenizer "$name" --head-dim 64 \
        --window-pattern L --total-batch-size 4096
    run python -m scripts.base_eval --source "base/$name" --corpus "$corpus" --resume
    # Replayed text and low rates keep what pretraining taught; the tasks learn fast enough.
    run python -m scripts.mid_train --source "base/$name" "${small[@]}" "${chat[@]}" --mix "${mid_mix[@]}" \
        --replay 0.25 --lr-scale 1.0 --warmdown 0.5
    run python -m scripts.chat_sft --source "mid/$name" "${small[@]}" "${chat[@]}" --mix "${sft_mix[@]}" \
        --replay 0.15 --lr-scale 0.25
    if [ "${RL:-1}" != 0 ]; then
        run python -m scripts.chat_rl --source "sft/$name" --tag "$name" "${rl[@]}" --group-size 8 --lr-scale 0.03 --eval-every 0 \
            --eval-samples 2 --resume
    fi
    # Not base: a model that has seen no conversation answers none of these, and at length.
    for stage in "${stages[@]:1}"; do
        run python -m scripts.chat_eval --source "$stage/$name" --resume --max-problems "$problems" \
            "${tasks[@]/#/--task=}"
    done
    # What people type first, all 308 messages of it: the report opens with them.
    run python -m scripts.chat_eval --source "sft/$name" --resume --task first_contact --max-tokens 120
fi

run python -m scripts.report --tag "$name"
run python -m scripts.chat_cli --source "sft/$name" -p "Who are you?"
echo
page=report/report.html
[ "$name" = default ] || page="report/$name/report.html"
echo "report: $NANOCHAT_BASE_DIR/$page"
echo "talk to it: .venv/bin/python -m scripts.chat_cli --source sft/$name"

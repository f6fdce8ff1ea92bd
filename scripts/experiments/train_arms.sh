#!/usr/bin/env bash
# What latents add to the tokens that they stand on. All arms are trained alike: the selection of CKPT, which stays as it
# is, the same questions in the same order, loss, steps, and 16 learned vectors per LLM before everything. The encoder
# knows the question, which stands as text behind the wire (SOURCE=aware): all M places are the context's. Judged on dev
# questions that nobody has looked at. Killed and started again it continues. ARMS and SEEDS choose among
#   ids                  the tokens alone
#   ids_marked           the tokens, and a mark on those of the encoder's own answer
#   latentwire           the tokens, and a residual on each
#   selected_text_tuned  their text; selected_words_tuned: in whole words; text_tuned: the whole text
set -euo pipefail
source "$(dirname "$0")/../common.sh"
for name in arms seeds ckpt source llms samples epochs k eval_samples skip save_dir; do
    value=$(setting arms "$name")
    declare "$name=$value"
done
export SOURCE=$source LLMS=$llms EPOCHS=$epochs K=$k OUTPUT_DIR=$save_dir
show arms
train --stage codebook --init "$ckpt" --adapter_type preamble --save_dir "$save_dir/base"
base=$save_dir/base/checkpoint_best

# arm NAME SEED: its training and its evaluation.
arm() {
    local folder=$save_dir/seed$2/$1 with=(--init "$base" --seed "$2" --samples "$samples")
    local judged=(--skip "$skip" --samples "$eval_samples" --save_dir "$folder/eval")
    case "$1" in
        *_tuned)
            train --stage "$1" "${with[@]}" --save_dir "$folder/$1"
            program eval --ckpt "$base" --tuned "$folder" --conditions "$1" "${judged[@]}"
            return
            ;;
        latentwire) with+=(--encoder_type hf) ;;
        *) with+=(--encoder_type "$1") ;;
    esac
    train --stage adapters "${with[@]}" --save_dir "$folder"
    program eval --ckpt "$folder/checkpoint_best" --conditions latentwire "${judged[@]}"
}

compared=()
for seed in $seeds; do
    for one in $arms; do arm "$one" "$seed"; done
done
for one in $arms; do
    folders=$(printf ",$save_dir/seed%s/$one/eval" $seeds)
    [[ $one == *_tuned ]] && folders+=":$one"
    compared+=("${folders:1}")
done
program compare "${compared[@]}" --margin 0.02 --selection "$base" --save_dir "$save_dir"

#!/usr/bin/env bash
# What latents add to the tokens that they stand on. All arms are trained alike: the selection of CKPT, which stays as it
# is, the same questions in the same order, loss, steps, and 16 learned vectors per LLM before everything. The encoder
# knows the question, which stands as text behind the wire (SOURCE=aware): all M places are the context's. Judged on dev
# questions that nobody has looked at. Killed and started again it continues. ARMS and SEEDS choose among
#   ids                  the tokens alone
#   ids_marked           the tokens, and a mark on those of the encoder's own answer
#   latentwire           the tokens, and a residual on each; evaluated with codec compact8, too
#   more_ids             the tokens alone, but MORE of them, with codec compact0: as many bytes as latentwire with compact8
#   selected_text_tuned  their text; selected_words_tuned: in whole words; text_tuned: the whole text
set -euo pipefail
source "$(dirname "$0")/../common.sh"
show arms
export SOURCE LLMS EPOCHS K OUTPUT_DIR
train --stage codebook --init "$CKPT" --adapter_type preamble --save_dir "$OUTPUT_DIR/base"
base=$OUTPUT_DIR/base/checkpoint_best

# arm NAME SEED: its training and its evaluation.
arm() {
    local folder=$OUTPUT_DIR/seed$2/$1 with=(--init "$base" --seed "$2" --samples "$SAMPLES") encoder=$1
    local judged=(--skip "$SKIP" --samples "$EVAL_SAMPLES")
    case "$1" in
        *_tuned)
            train --stage "$1" "${with[@]}" --save_dir "$folder/$1"
            program eval --ckpt "$base" --tuned "$folder" --conditions "$1" "${judged[@]}" --save_dir "$folder/eval"
            return
            ;;
        latentwire) encoder=hf ;;
        more_ids) encoder=ids with+=(--latent_len "$MORE") ;;
    esac
    train --stage adapters --encoder_type "$encoder" "${with[@]}" --save_dir "$folder"
    local made=$folder/checkpoint_best
    judged+=(--conditions latentwire)
    [ "$1" = more_ids ] || program eval --ckpt "$made" "${judged[@]}" --save_dir "$folder/eval"
    case "$1" in
        latentwire) codec=compact8 ;;
        more_ids) codec=compact0 ;;
        *) return ;;
    esac
    [ -f "$made/codec/tables.safetensors" ] || program fit_codec --ckpt "$made"
    program eval --ckpt "$made" "${judged[@]}" --codec "$codec" --save_dir "$folder/eval_$codec"
}

# of EVAL ARM: the evaluations of an arm's seeds, as compare.py takes them.
of() {
    local folders
    folders=$(for seed in $SEEDS; do printf ",%s" "$OUTPUT_DIR/seed$seed/$2/$1"; done)
    echo "${folders:1}"
}

for seed in $SEEDS; do
    for one in $ARMS; do arm "$one" "$seed"; done
done
same_places=() same_bytes=()
for one in $ARMS; do
    case "$one" in
        *_tuned) same_places+=("$(of eval "$one"):$one") ;;
        more_ids) same_bytes+=("$(of eval_compact0 "$one")") ;;
        latentwire) same_bytes+=("$(of eval_compact8 "$one")") && same_places+=("$(of eval "$one")") ;;
        *) same_places+=("$(of eval "$one")") ;;
    esac
done
pair() { program compare "${@:2}" --margin 0.02 --selection "$base" --save_dir "$1"; }
[ ${#same_places[@]} -eq 0 ] || pair "$OUTPUT_DIR" "${same_places[@]}"
[ ${#same_bytes[@]} -eq 0 ] || pair "$OUTPUT_DIR/same_bytes" "${same_bytes[@]}"

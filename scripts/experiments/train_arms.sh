#!/usr/bin/env bash
# What latents add to the tokens that they stand on. All arms are trained alike: the selection of CKPT, which stays as it
# is, the same questions in the same order, loss, steps, and 16 learned vectors per LLM before everything. The encoder
# knows the question, which stands as text behind the wire (SOURCE=aware): all M places are the context's. Judged on dev
# questions behind the first SKIP, or on those of IDS. AT_ONCE of them run at a time. Killed and started again it
# continues. ARMS and SEEDS choose among
#   ids                  the tokens alone
#   ids_marked           the tokens, and a mark on those of the encoder's own answer
#   latentwire           the tokens, and a residual on each
#   narrow               the same with a residual of 8 directions
#   more_ids             the tokens alone, but MORE of them, with codec compact0: as many bytes as latentwire with compact8
#   selected_text_tuned  their text; selected_words_tuned: in whole words; text_tuned: the whole text
#   untrained            what trains nothing, answered once: the text, whole, cut and selected, PCA of the selection, no text
set -euo pipefail
source "$(dirname "$0")/../common.sh"
show arms
export SOURCE LLMS EPOCHS K OUTPUT_DIR
export -n SAMPLES SKIP  # of the arms alone
judged=(--skip "$SKIP" --samples "$EVAL_SAMPLES")
if [ -n "$IDS" ]; then
    [ -f "$IDS" ] || { echo "error: IDS=$IDS: there is no such file" >&2 && exit 2; }
    judged=(--ids "$IDS")
fi
UNTRAINED="text token_budget selected_text selected_words pca_selected no_context" control=shuffled_z
[ "$SOURCE" = context ] || { UNTRAINED+=" sentence encoder_only" && control=shuffled_context_z; }
# An arm's smaller wires, the fewest bytes first.
declare -A CODECS=([latentwire]="compact8" [narrow]="coarse8 coarse4 compact8" [ids_marked]="compact1" [more_ids]="compact0")

# begin FOLDER [FLAG...]: what arms start from: the selection of CKPT, codes and adapters in closed form.
begin() { train --stage codebook --init "$CKPT" --adapter_type "$ADAPTER_TYPE" --save_dir "$@"; }

begin "$OUTPUT_DIR/base"
base=$OUTPUT_DIR/base/checkpoint_best
if [[ " $ARMS " == *" narrow "* ]]; then begin "$OUTPUT_DIR/base8" --residual_rank 8; fi

# judge FLAG...: an evaluation; M is the checkpoint's, whatever LATENT_LEN says.
judge() { LATENT_LEN='' program eval "$@" "${judged[@]}"; }

# arm NAME SEED: its training and its evaluation.
arm() {
    local folder=$OUTPUT_DIR/seed$2/$1 with=(--seed "$2" --samples "$SAMPLES") from=$base encoder=$1
    local asked=latentwire codec
    case "$1" in
        *_tuned)
            train --stage "$1" --init "$base" "${with[@]}" --save_dir "$folder/$1"
            judge --ckpt "$base" --tuned "$folder" --conditions "$1" --save_dir "$folder/eval"
            return
            ;;
        latentwire)
            encoder=hf
            [ "$2" != "${SEEDS%% *}" ] || asked+=,$control # the wire of another text, once
            ;;
        narrow)
            encoder=hf from=$OUTPUT_DIR/base8/checkpoint_best with+=(--residual_rank 8)
            ;;
        more_ids) encoder=ids with+=(--latent_len "$MORE") ;;
    esac
    train --stage adapters --encoder_type "$encoder" --init "$from" "${with[@]}" --save_dir "$folder"
    local made=$folder/checkpoint_best
    [ "$1" = more_ids ] || judge --ckpt "$made" --conditions "$asked" --save_dir "$folder/eval"
    [ -n "${CODECS[$1]:-}" ] || return 0
    [ -f "$made/codec/tables.safetensors" ] || program fit_codec --ckpt "$made"
    for codec in ${CODECS[$1]}; do
        judge --ckpt "$made" --conditions latentwire --codec "$codec" --save_dir "$folder/eval_$codec"
    done
}

# of EVAL ARM: the evaluations of an arm's seeds, as compare.py takes them.
of() {
    local folders
    folders=$(for seed in $SEEDS; do printf ",%s" "$OUTPUT_DIR/seed$seed/$2/$1"; done)
    echo "${folders:1}"
}

for seed in $SEEDS; do
    for one in $ARMS; do
        if [ "$one" != untrained ]; then beside "seed$seed/$one" arm "$one" "$seed"; fi
    done
done
if [[ " $ARMS " == *" untrained "* ]]; then
    beside untrained judge --ckpt "$base" --conditions "${UNTRAINED// /,}" --save_dir "$OUTPUT_DIR/untrained"
fi
all_done
same_places=() same_bytes=()
for one in $ARMS; do
    case "$one" in
        untrained) for rival in $UNTRAINED; do same_places+=("$OUTPUT_DIR/untrained:$rival"); done ;;
        *_tuned) same_places+=("$(of eval "$one"):$one") ;;
        more_ids) same_bytes+=("$(of eval_compact0 "$one")") ;;
        latentwire)
            same_bytes+=("$(of eval_compact8 "$one")")
            same_places+=("$(of eval "$one")" "$OUTPUT_DIR/seed${SEEDS%% *}/latentwire/eval:$control")
            ;;
        *) same_places+=("$(of eval "$one")") ;;
    esac
done
# pair FOLDER RUN...: the comparison, where there is more than one evaluation.
pair() {
    [ $# -gt 2 ] || [[ ${2:-} == *,* ]] || return 0
    program compare "${@:2}" --pair_seeds --margin 0.02 --selection "$base" --save_dir "$1"
}
pair "$OUTPUT_DIR" "${same_places[@]}"
pair "$OUTPUT_DIR/same_bytes" "${same_bytes[@]}"
for one in $ARMS; do # the same weights, in fewer bytes
    if [ "$one" = more_ids ] || [ -z "${CODECS[$one]:-}" ]; then continue; fi
    mapfile -t coded < <(for codec in ${CODECS[$one]}; do of "eval_$codec" "$one"; done)
    program compare "$(of eval "$one")" "${coded[@]}" --margin 0.01 --save_dir "$OUTPUT_DIR/codecs/$one"
done

#!/usr/bin/env bash
# What each part is worth: one short training a row, of one LLM, judged on articles of train that no training sees, each
# paired with the first row, which is the mean of three training seeds. Killed and started again it continues.
# ROWS chooses among them; SAMPLES, EVAL_SAMPLES, LLMS, DTYPE, ... as in the other scripts.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
OUTPUT_DIR=${OUTPUT_DIR:-runs/ablations} EVAL_SAMPLES=${EVAL_SAMPLES:-300}
export SOURCE=${SOURCE:-prompt} LLMS=${LLMS:-llama} SAMPLES=${SAMPLES:-2000} EPOCHS=${EPOCHS:-1} SCORES_EPOCHS=${SCORES_EPOCHS:-1} PYTHON
ROWS=${ROWS:-queries byte random_interface cif kd no_span M8 M16 M64}
DATASET=${DATASET:-squad} DTYPE=${DTYPE:-} MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-12} KD_WEIGHT=${KD_WEIGHT:-0}
show LLAMA_ID QWEN_ID LLMS DATASET SOURCE SAMPLES EPOCHS SCORES_EPOCHS EVAL_SAMPLES DTYPE ROWS OUTPUT_DIR
scores=$OUTPUT_DIR/base/stages/scores/checkpoint_best  # what a row does not change it need not train again

# row NAME SETTING...: training and evaluation with these settings.
row() {
    local name=$1
    shift
    env KD_WEIGHT="$KD_WEIGHT" "$@" OUTPUT_DIR="$OUTPUT_DIR/$name" bash scripts/experiments/train_latentwire.sh
    OUTPUT_DIR=$OUTPUT_DIR/$name logged "$PYTHON" -u latentwire/eval.py --ckpt "$OUTPUT_DIR/$name/checkpoint_best" \
        --split held_out --samples "$EVAL_SAMPLES" --conditions latentwire --dataset "$DATASET" --source "$SOURCE" --llms "$LLMS" \
        --dtype "$DTYPE" --max_new_tokens "$MAX_NEW_TOKENS" --save_dir "$OUTPUT_DIR/$name/eval"
}

# change NAME: puts the settings of the row of this name into `changed`.
change() {
    case "$1" in
        queries | byte) changed=(ENCODER_TYPE="$1") ;;
        random_interface) changed=(INTERFACE=random) ;;
        cif) changed=(POOLING=cif) ;;
        kd) changed=(KD_WEIGHT=0.5 INIT="$scores") ;;
        no_span) changed=(SPAN_WEIGHT=0) ;;
        M[1-9]*) changed=(LATENT_LEN="${1#M}" INIT="$scores") ;;
        *) echo "error: ROWS: $1 is not known; choose among those in $0" >&2; exit 2 ;;
    esac
}
for name in $ROWS; do change "$name"; done

row base
row seed1 SEED=1
row seed2 SEED=2
compared=("$OUTPUT_DIR/base/eval,$OUTPUT_DIR/seed1/eval,$OUTPUT_DIR/seed2/eval")
for name in $ROWS; do
    change "$name"
    row "$name" "${changed[@]}"
    compared+=("$OUTPUT_DIR/$name/eval")
done
logged "$PYTHON" -u latentwire/compare.py "${compared[@]}" --save_dir "$OUTPUT_DIR"

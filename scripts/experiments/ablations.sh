#!/usr/bin/env bash
# What each part is worth: one short training per row, of one LLM, judged on articles of train that no training sees, each
# paired with the first row, which is the mean of three training seeds. AT_ONCE rows run at a time. Killed and started
# again it continues.
# ROWS chooses among them; SAMPLES, EVAL_SAMPLES, LLMS, DTYPE, ... as in the other scripts.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
show ablations
export OUTPUT_DIR LLMS SAMPLES EPOCHS SCORES_EPOCHS KD_WEIGHT
scores=$OUTPUT_DIR/base/stages/scores/checkpoint_best  # what a row does not change it need not train again

# row NAME SETTING...: training and evaluation with these settings.
row() {
    local folder=$OUTPUT_DIR/$1
    shift
    env "$@" OUTPUT_DIR="$folder" bash scripts/experiments/train_latentwire.sh
    OUTPUT_DIR=$folder LATENT_LEN='' program eval --ckpt "$folder/checkpoint_best" --split held_out --samples "$EVAL_SAMPLES" \
        --conditions latentwire --save_dir "$folder/eval"
}

# change NAME: puts the settings of the row of this name into `changed`.
change() {
    case "$1" in
        queries | byte) changed=(ENCODER_TYPE="$1") ;;
        random_codes) changed=(CODES=random) ;;
        cif) changed=(POOLING=cif) ;;
        kd) changed=(KD_WEIGHT=0.5 INIT="$scores") ;;
        no_span) changed=(SPAN_WEIGHT=0) ;;
        perturbed) changed=(SPAN_WEIGHT=0 POOLING=perturbed) ;;
        M[1-9]*) changed=(LATENT_LEN="${1#M}" INIT="$scores") ;;
        *) echo "error: ROWS: $1 is not known; choose among those in $0" >&2; exit 2 ;;
    esac
}
for name in $ROWS; do change "$name"; done

beside base row base SEED=0
beside seed1 row seed1 SEED=1
beside seed2 row seed2 SEED=2
all_done # rows begin from stages of the base
compared=("$OUTPUT_DIR/base/eval,$OUTPUT_DIR/seed1/eval,$OUTPUT_DIR/seed2/eval")
for name in $ROWS; do
    change "$name"
    beside "$name" row "$name" "${changed[@]}"
    compared+=("$OUTPUT_DIR/$name/eval")
done
all_done
program compare "${compared[@]}" --save_dir "$OUTPUT_DIR"

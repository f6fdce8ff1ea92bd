#!/usr/bin/env bash
# Train and evaluate every combination of LATENT_LENS, D_ZS, FTCE_WEIGHTS and KS, and rank them on questions that are not
# trained on. Killed and started again it continues, and tries failed ones once more. --dry-run prints all and the time.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
OUTPUT_DIR=${OUTPUT_DIR:-runs/sweeps/hyperparam}
LATENT_LENS=${LATENT_LENS:-32,48,64} D_ZS=${D_ZS:-256,512} FTCE_WEIGHTS=${FTCE_WEIGHTS:-0.5,1.0} KS=${KS:-4,8}
SAMPLES=${SAMPLES:-} EPOCHS=${EPOCHS:-1} EVAL_SAMPLES=${EVAL_SAMPLES:-300}
GPUS_PER_TRIAL=${GPUS_PER_TRIAL:-} CONCURRENT=${CONCURRENT:-} SCORES_EPOCHS=${SCORES_EPOCHS:-3}
training_settings >/dev/null  # the defaults of what is not varied; the trials find them in their environment
export SOURCE DTYPE ENCODER_TYPE ENCODER_ID POOLING LR KD_WEIGHT SPAN_WEIGHT BATCH_SIZE SCORES_EPOCHS VAL_SAMPLES \
    MAX_NEW_TOKENS
show LLAMA_ID QWEN_ID LLMS DATASET SOURCE LATENT_LENS D_ZS FTCE_WEIGHTS KS SAMPLES EPOCHS EVAL_SAMPLES SEED \
    GPUS_PER_TRIAL CONCURRENT BATCH_SIZE ENCODER_TYPE ENCODER_ID POOLING LR KD_WEIGHT SPAN_WEIGHT SCORES_EPOCHS \
    VAL_SAMPLES MAX_NEW_TOKENS DTYPE OUTPUT_DIR
set -- --latent_lens "$LATENT_LENS" --d_zs "$D_ZS" --ftce_weights "$FTCE_WEIGHTS" --ks "$KS" \
    --epochs "$EPOCHS" --eval_samples "$EVAL_SAMPLES" --seed "$SEED" --dataset "$DATASET" --llms "$LLMS" \
    --save_dir "$OUTPUT_DIR" "$@"
[ -z "$SAMPLES" ] || set -- --samples "$SAMPLES" "$@"  # without it, on a CPU, over 2 hours are refused
[ -z "$GPUS_PER_TRIAL" ] || set -- --gpus_per_trial "$GPUS_PER_TRIAL" "$@"
[ -z "$CONCURRENT" ] || set -- --concurrent "$CONCURRENT" "$@"
logged "$PYTHON" -u latentwire/sweep.py "$@"

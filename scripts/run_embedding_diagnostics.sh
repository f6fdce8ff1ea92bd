#!/usr/bin/env bash
# What learned embeddings look like beside those of text, and what changing them does: findings.md, diagnostics.json and
# charts. CKPT names a checkpoint; without it a quick one is trained first (TRAIN_SAMPLES questions, one epoch).
set -euo pipefail
source "$(dirname "$0")/common.sh"
OUTPUT_DIR=${OUTPUT_DIR:-runs/embed_diagnostics}
TRAIN_SAMPLES=${TRAIN_SAMPLES:-1000} EVAL_SAMPLES=${EVAL_SAMPLES:-100} CKPT=${CKPT:-}
DATASET=${DATASET:-squad} SOURCE=${SOURCE:-prompt} SEED=${SEED:-0} LLMS=${LLMS:-llama,qwen} DTYPE=${DTYPE:-}
BATCH_SIZE=${BATCH_SIZE:-16} MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-12}
show LLAMA_ID QWEN_ID LLMS DATASET SOURCE SEED CKPT TRAIN_SAMPLES EVAL_SAMPLES BATCH_SIZE MAX_NEW_TOKENS DTYPE OUTPUT_DIR
if [ -z "$CKPT" ]; then
    PYTHON=$PYTHON OUTPUT_DIR=$OUTPUT_DIR/quick SAMPLES=$TRAIN_SAMPLES EPOCHS=1 SCORES_EPOCHS=${SCORES_EPOCHS:-1} \
        bash scripts/experiments/train_latentwire.sh
    CKPT=$OUTPUT_DIR/quick/checkpoint_best
fi
logged "$PYTHON" -u latentwire/diagnostics.py --ckpt "$CKPT" --dataset "$DATASET" --source "$SOURCE" --seed "$SEED" \
    --llms "$LLMS" --samples "$EVAL_SAMPLES" --dtype "$DTYPE" --batch_size "$BATCH_SIZE" \
    --max_new_tokens "$MAX_NEW_TOKENS" --save_dir "$OUTPUT_DIR"

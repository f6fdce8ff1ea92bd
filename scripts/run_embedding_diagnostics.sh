#!/usr/bin/env bash
# What learned embeddings look like beside those of text, and what changing them does: findings.md, diagnostics.json and
# charts. CKPT names a checkpoint; without it a quick one is trained first (TRAIN_SAMPLES questions, one epoch).
set -euo pipefail
source "$(dirname "$0")/common.sh"
show diagnostics
export OUTPUT_DIR
if [ -z "${CKPT:-}" ]; then
    OUTPUT_DIR=$OUTPUT_DIR/quick SAMPLES=$TRAIN_SAMPLES EPOCHS=1 SCORES_EPOCHS=${SCORES_EPOCHS:-1} \
        bash scripts/experiments/train_latentwire.sh
    export CKPT=$OUTPUT_DIR/quick/checkpoint_best
fi
program diagnostics

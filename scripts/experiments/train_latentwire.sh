#!/usr/bin/env bash
# Train LatentWire: codebook (closed form), token scores, adapters, then everything jointly. Of EPOCHS passes through
# the LLMs the first trains the adapters alone, unless it is the only one; the token scores, which need no LLM, get
# SCORES_EPOCHS passes, through SCORES_SAMPLES questions where that differs from SAMPLES. Without span supervision
# (SPAN_WEIGHT=0) they are left to the LLMs' losses. INIT names a checkpoint to begin with instead of the first two.
# Killed and started again it continues, stage by stage, and ends with the same weights.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
OUTPUT_DIR=${OUTPUT_DIR:-runs/experiments/latentwire}
SCORES_EPOCHS=${SCORES_EPOCHS:-3} SCORES_SAMPLES=${SCORES_SAMPLES:-${SAMPLES:-}} INIT=${INIT:-}
training_settings SCORES_EPOCHS SCORES_SAMPLES INIT
stages=$OUTPUT_DIR/stages start=$INIT joint=$EPOCHS
if [ -z "$start" ]; then
    start=$stages/codebook/checkpoint_best
    train codebook "$stages/codebook"
    if [ "$ENCODER_TYPE" = hf ] && [ "$SPAN_WEIGHT" != 0 ]; then
        SAMPLES=$SCORES_SAMPLES train scores "$stages/scores" --init "$start" --epochs "$SCORES_EPOCHS"
        start=$stages/scores/checkpoint_best
    fi
fi
if [ "$ENCODER_TYPE" = hf ] && [ "$EPOCHS" != 1 ]; then  # free queries cannot be read before they are trained
    train adapters "$stages/adapters" --init "$start" --epochs 1
    start=$stages/adapters/checkpoint_best joint=$((EPOCHS - 1))
fi
train joint "$OUTPUT_DIR" --init "$start" --epochs "$joint"

#!/usr/bin/env bash
# Train LatentWire: codebook (closed form), token scores, adapters, then everything jointly. Of EPOCHS passes through
# the LLMs the first trains the adapters alone, unless it is the only one; the token scores, which need no LLM, get
# SCORES_EPOCHS passes, through SCORES_SAMPLES questions where that differs from SAMPLES.
# Killed and started again it continues, stage by stage, and ends with the same weights.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
OUTPUT_DIR=${OUTPUT_DIR:-runs/experiments/latentwire}
SCORES_EPOCHS=${SCORES_EPOCHS:-3} SCORES_SAMPLES=${SCORES_SAMPLES:-${SAMPLES:-}}
training_settings SCORES_EPOCHS SCORES_SAMPLES
stages=$OUTPUT_DIR/stages
train codebook "$stages/codebook"
start=$stages/codebook joint=$EPOCHS
if [ "$ENCODER_TYPE" = hf ]; then  # free queries cannot be trained before the LLMs read them
    SAMPLES=$SCORES_SAMPLES train scores "$stages/scores" --init "$start/checkpoint_best" --epochs "$SCORES_EPOCHS"
    start=$stages/scores
    if [ "$EPOCHS" != 1 ]; then
        train adapters "$stages/adapters" --init "$start/checkpoint_best" --epochs 1
        start=$stages/adapters joint=$((EPOCHS - 1))
    fi
fi
train joint "$OUTPUT_DIR" --init "$start/checkpoint_best" --epochs "$joint"

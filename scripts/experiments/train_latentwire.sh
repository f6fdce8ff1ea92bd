#!/usr/bin/env bash
# Train LatentWire: codebook (closed form), token scores, adapters, then everything jointly. Of EPOCHS passes through
# the LLMs the first trains the adapters alone, unless it is the only one; the token scores, which need no LLM, get
# SCORES_EPOCHS passes, through SCORES_SAMPLES questions where that differs from SAMPLES. Without span supervision
# (SPAN_WEIGHT=0) they are left to the LLMs' losses. INIT names a checkpoint to begin with instead of the first two.
# Killed and started again it continues, stage by stage, and ends with the same weights.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
show train
export OUTPUT_DIR
train --stage all

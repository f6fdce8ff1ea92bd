#!/usr/bin/env bash
# A trained system deserves trained rivals: a soft prompt of 16 vectors per LLM before the whole text and before the
# token budget, trained on LatentWire's data and loss; then both are evaluated on EVAL_SAMPLES questions. With CKPT the
# text that this checkpoint selects gets one too, and the checkpoint is evaluated beside them, question by question (REUSE
# takes its answers from an evaluation that has them).
set -euo pipefail
source "$(dirname "$0")/../common.sh"
LATENT_LEN=${LATENT_LEN:-32}
OUTPUT_DIR=${OUTPUT_DIR:-runs/baselines/tuned/M$LATENT_LEN}
EVAL_SAMPLES=${EVAL_SAMPLES:-}
training_settings EVAL_SAMPLES
train text_tuned "$OUTPUT_DIR/text_tuned" --epochs "$EPOCHS"  # first: it needs the most memory, and says so at once
train token_budget_tuned "$OUTPUT_DIR/token_budget_tuned" --epochs "$EPOCHS"
if [ -n "${CKPT:-}" ]; then
    train selected_text_tuned "$OUTPUT_DIR/selected_text_tuned" --init "$CKPT" --epochs "$EPOCHS"
fi
export TUNED=$OUTPUT_DIR
OUTPUT_DIR=$OUTPUT_DIR/eval SAMPLES=$EVAL_SAMPLES
evaluate "${CKPT:+latentwire,selected_text_tuned,}token_budget_tuned,text_tuned"

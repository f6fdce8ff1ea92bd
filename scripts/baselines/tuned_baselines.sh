#!/usr/bin/env bash
# Trained rivals for a trained system: a soft prompt of 16 vectors per LLM before the whole text and before the token
# budget, trained on LatentWire's data and loss; then both are evaluated on EVAL_SAMPLES questions. With CKPT the text
# that this checkpoint selects gets one too, and the checkpoint is evaluated beside them, question by question (REUSE
# takes its answers from an evaluation that has them).
set -euo pipefail
source "$(dirname "$0")/../common.sh"
places=$(setting train latent_len)
export OUTPUT_DIR=${OUTPUT_DIR:-runs/baselines/tuned/M$places}
export TUNED=$OUTPUT_DIR
if [ -n "${CKPT:-}" ]; then export LLMS=${LLMS:-$(setting eval llms)}; fi  # of the checkpoint: all are compared with it
show train
rivals=(text_tuned token_budget_tuned)  # the first one needs the most memory, and says so at once
for rival in "${rivals[@]}"; do
    train --stage "$rival" --init "${CKPT:-}" --save_dir "$OUTPUT_DIR/$rival"  # whose LLMs they are
done
if [ -n "${CKPT:-}" ]; then
    train --stage selected_text_tuned --init "$CKPT" --save_dir "$OUTPUT_DIR/selected_text_tuned"
    rivals=(latentwire selected_text_tuned "${rivals[@]}")
fi
conditions=$(IFS=, && echo "${rivals[*]}")
export SAMPLES=${EVAL_SAMPLES:-} OUTPUT_DIR=$OUTPUT_DIR/eval
evaluate --conditions "$conditions" --latent_len "$places"

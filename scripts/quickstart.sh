#!/usr/bin/env bash
# From a fresh clone to a table: environment, offline models, evaluation of both LLMs, table and chart. It trains
# nothing, but where train_latentwire.sh left a checkpoint (or CKPT names one) that is what it evaluates.
# Safe to interrupt and to run again. SAMPLES, DATASET, LLAMA_ID, ... as in the other scripts.
set -euo pipefail
# The small models also on a GPU: they need no hub and no licence.
export LLAMA_ID=${LLAMA_ID:-offline:smollm2-135m-instruct} QWEN_ID=${QWEN_ID:-offline:qwen2.5-coder-0.5b-instruct}
source "$(dirname "$0")/common.sh"
trained=runs/experiments/latentwire/checkpoint_best
if [ -z "${CKPT:-}" ] && [ -f $trained/config.json ]; then CKPT=$trained; fi
OUTPUT_DIR=${OUTPUT_DIR:-runs/quickstart${CKPT:+_trained}}
SAMPLES=${SAMPLES:-80}
case "$LLAMA_ID $QWEN_ID" in *offline:*) "$PYTHON" latentwire/models_cache.py ;; esac
evaluate text,token_budget,token_budget@64,pca,latentwire,no_context

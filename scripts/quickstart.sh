#!/usr/bin/env bash
# From a fresh clone to a table: environment, offline models, evaluation of both LLMs, table and chart.
# Safe to interrupt and to run again. SAMPLES, DATASET, LLAMA_ID, ... as in the other scripts.
set -euo pipefail
bash "$(dirname "$0")/setup_env.sh"
source "$(dirname "$0")/common.sh"
OUTPUT_DIR=${OUTPUT_DIR:-runs/quickstart}
SAMPLES=${SAMPLES:-80}
case "$LLAMA_ID $QWEN_ID" in *offline:*) "$PYTHON" latentwire/models_cache.py ;; esac
evaluate text,token_budget,token_budget@64,pca,latentwire,no_context

#!/usr/bin/env bash
# From a fresh clone to a table, a chart and a page: environment, offline models, evaluation of both LLMs on the sample
# set, which no checkpoint has seen, and on SQuAD where SQUAD_DIR is set. It trains nothing: it evaluates the checkpoint
# that train_latentwire.sh left, else the one that ships here (CKPT names another, CKPT= none).
# Safe to interrupt and to run again. SAMPLES, DATASET, LLAMA_ID, ... as in the other scripts.
set -euo pipefail
# The small models also on a GPU: they need no hub and no licence.
export LLAMA_ID=${LLAMA_ID:-offline:smollm2-135m-instruct} QWEN_ID=${QWEN_ID:-offline:qwen2.5-coder-0.5b-instruct}
source "$(dirname "$0")/common.sh"
trained=runs/experiments/latentwire/checkpoint_best folder=runs/quickstart_trained
if [ ! -f $trained/config.json ]; then trained=checkpoints/latentwire_m32 folder=runs/quickstart; fi
CKPT=${CKPT-$trained} SAMPLES=${SAMPLES:-80} folder=${OUTPUT_DIR:-$folder}
datasets=(sample ${SQUAD_DIR:+squad})
if [ -n "${DATASET:-}" ]; then datasets=("$DATASET"); fi
case "$LLAMA_ID $QWEN_ID" in *offline:*) "$PYTHON" -m latentwire.llms.offline ;; esac
for DATASET in "${datasets[@]}"; do
    OUTPUT_DIR=$folder/$(basename "$DATASET") \
        evaluate text,token_budget,token_budget@64,pca,latentwire,untrained,no_context
done

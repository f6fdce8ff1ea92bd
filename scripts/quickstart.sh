#!/usr/bin/env bash
# From a fresh clone to a table, a chart and a page: environment, offline models, evaluation of both LLMs on the sample
# set, which no checkpoint has seen, and on SQuAD where SQUAD_DIR is set. It trains nothing: it evaluates the checkpoint
# that train_latentwire.sh left, else the one that ships here (CKPT names another, CKPT= none).
# It reads in bfloat16 where the processor computes in it (2 to 4 times as fast), else in float32; DTYPE says otherwise.
# Safe to interrupt and to run again. SAMPLES, DATASET, LLAMA_ID, ... as in the other scripts.
set -euo pipefail
source "$(dirname "$0")/common.sh"
own=runs/experiments/latentwire/checkpoint_best folder=runs/quickstart ships=checkpoints/latentwire_m32
if [ -f $own/config.json ]; then ships=$own folder=runs/quickstart_trained; fi
export CKPT=${CKPT-$ships} SAMPLES=${SAMPLES:-80} DTYPE=${DTYPE:-native}
folder=${OUTPUT_DIR:-$folder}
datasets=(sample ${SQUAD_DIR:+squad})
if [ -n "${DATASET:-}" ]; then datasets=("$DATASET"); fi
for DATASET in "${datasets[@]}"; do
    export DATASET OUTPUT_DIR=$folder/$(basename "$DATASET")
    evaluate --conditions latentwire,quick  # an answer from the wire comes first
done

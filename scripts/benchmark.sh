#!/usr/bin/env bash
# How fast, as ratios measured side by side: training, answering, serving, the share of the device's own ceiling, growth.
# Killed and started again it continues with the next part. RANDOM_WEIGHTS=1 takes the shapes of Llama-3.1-8B and
# Qwen2.5-7B with random weights made on the GPU.
set -euo pipefail
source "$(dirname "$0")/common.sh"
batch=4  # the plain step keeps logits at every position: 16 questions of it take a CPU machine more than 24 GB
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then batch=32; fi
OUTPUT_DIR=${OUTPUT_DIR:-runs/benchmark} DATASET=${DATASET:-squad} LLMS=${LLMS:-llama,qwen} DTYPE=${DTYPE:-}
PARTS=${PARTS:-train,text_eval,serving,mfu,growth,processes} BATCH_SIZE=${BATCH_SIZE:-$batch} STEPS=${STEPS:-4} REPEATS=${REPEATS:-3}
LATENT_LEN=${LATENT_LEN:-32} D_Z=${D_Z:-256} ENCODER_ID=${ENCODER_ID:-offline:all-minilm-l6-v2}
RANDOM_WEIGHTS=${RANDOM_WEIGHTS:-0}
show LLAMA_ID QWEN_ID LLMS DATASET PARTS BATCH_SIZE STEPS REPEATS LATENT_LEN D_Z ENCODER_ID RANDOM_WEIGHTS DTYPE OUTPUT_DIR
extra=()
case "$RANDOM_WEIGHTS" in
    0) ;;
    1) extra+=(--random_weights) ;;
    *) echo "error: RANDOM_WEIGHTS=$RANDOM_WEIGHTS: 1 makes the large shapes, 0 takes the models" >&2; exit 2 ;;
esac
logged "$PYTHON" -u latentwire/benchmark.py --parts "$PARTS" --dataset "$DATASET" --llms "$LLMS" --dtype "$DTYPE" \
    --batch_size "$BATCH_SIZE" --steps "$STEPS" --repeats "$REPEATS" --latent_len "$LATENT_LEN" --d_z "$D_Z" \
    --encoder_id "$ENCODER_ID" --save_dir "$OUTPUT_DIR" ${extra[@]+"${extra[@]}"}

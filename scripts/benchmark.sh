#!/usr/bin/env bash
# How fast, as ratios measured side by side: training, answering, serving, the share of the device's own ceiling, growth.
# Killed and started again it continues with the next part. RANDOM_WEIGHTS=1 takes the shapes of Llama-3.1-8B and
# Qwen2.5-7B with random weights made on the GPU.
set -euo pipefail
source "$(dirname "$0")/common.sh"
show benchmark
export OUTPUT_DIR
program benchmark

#!/usr/bin/env bash
# Train dense latents: a text is encoded before anyone asks (SOURCE=context). Each window of its tokens gives one latent, led
# by the rarest token (ENCODER_TYPE=anchors); the adapters also add to the keys and values of each layer (ADAPTER_TYPE=deep).
# Each step draws its M among LATENT_LENS, so that one checkpoint serves all of them. On a GPU: all questions, three passes.
# On a CPU, unless SAMPLES and EPOCHS say otherwise: 16,000 questions, one pass, a night. Killed and started again it continues.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
export SOURCE=${SOURCE:-context} ENCODER_TYPE=${ENCODER_TYPE:-anchors} ADAPTER_TYPE=${ADAPTER_TYPE:-deep}
export LATENT_LENS=${LATENT_LENS:-16,32,64} K=${K:-12} OUTPUT_DIR=${OUTPUT_DIR:-runs/experiments/dense}
if ! "$PYTHON" -c "import sys; from latentwire.utils.cli import has_gpu; sys.exit(not has_gpu())"; then
    export SAMPLES=${SAMPLES:-16000} EPOCHS=${EPOCHS:-1} DTYPE=${DTYPE:-native}
fi
show train
train --stage all

#!/usr/bin/env bash
# vLLM as receiver: its answers from wires beside transformers' own, on SAMPLES questions of the sample set (CKPT, --llm).
# vLLM brings its own versions of torch and transformers, so it gets an environment of its own, .venv-vllm; VLLM names
# another package than vllm, for example a build for CPUs.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -f .venv-vllm/.installed ]; then
    "${BASE_PYTHON:-python3}" -m venv .venv-vllm
    .venv-vllm/bin/python -m pip install --disable-pip-version-check "${VLLM:-vllm>=0.10}" accelerate scikit-learn
    touch .venv-vllm/.installed
fi
PYTHONPATH="$PWD" exec .venv-vllm/bin/python latentwire/engine.py "$@"

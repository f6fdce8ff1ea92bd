#!/usr/bin/env bash
# vLLM as receiver: its answers from wires beside transformers' own, on SAMPLES questions of the sample set (CKPT, --llm).
# vLLM brings its own versions of torch and transformers, so it gets an environment of its own, .venv-vllm; VLLM names
# another package than vllm, for example a build for CPUs.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wanted=("${VLLM:-vllm>=0.10}" accelerate scikit-learn)
if [ "$(cat .venv-vllm/.installed 2>/dev/null)" != "${wanted[*]}" ]; then
    "${BASE_PYTHON:-python3}" -m venv .venv-vllm
    .venv-vllm/bin/python -m pip install --disable-pip-version-check "${wanted[@]}"
    echo "${wanted[*]}" >.venv-vllm/.installed  # written last: an interrupted set-up is done again
fi
PYTHONPATH="$PWD" exec .venv-vllm/bin/python latentwire/engine.py "$@"

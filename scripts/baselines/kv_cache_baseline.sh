#!/usr/bin/env bash
# A rival from outside: kvpress compresses the context's key-value cache, question unseen, to the entries that LATENT_LEN
# latents take. kvpress wants an older transformers, so it gets an environment of its own, .venv-kvpress (KVPRESS_PYTHON
# names another interpreter that has it), and works on questions that are written as token ids.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
places=$(setting outside latent_len)
export OUTPUT_DIR=${OUTPUT_DIR:-runs/baselines/kv_cache/M$places}
if [ -z "${KVPRESS_PYTHON:-}" ]; then
    KVPRESS_PYTHON=.venv-kvpress/bin/python
    wanted="kvpress==0.5.5 $(grep -o '^torch==[0-9.]*' requirements.txt)"
    if [ "$(cat .venv-kvpress/.installed 2>/dev/null)" != "$wanted" ]; then
        echo "setting up .venv-kvpress (a few minutes the first time) ..."
        "${BASE_PYTHON:-python3}" -m venv .venv-kvpress
        # shellcheck disable=SC2086
        $KVPRESS_PYTHON -m pip install --disable-pip-version-check $wanted
        echo "$wanted" >.venv-kvpress/.installed  # written last: an interrupted set-up is done again
    fi
fi
show outside
program outside --step ask
logged "$KVPRESS_PYTHON" -u scripts/baselines/kv_cache.py "$OUTPUT_DIR"
program outside --step score
program report "$OUTPUT_DIR"

# Sourced by every launcher: strict shell, repository root, Python, default models, settings, logs.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# The environment is made on first use; PYTHON names another interpreter that has everything.
if [ -z "${PYTHON:-}" ]; then
    bash scripts/setup_env.sh
    PYTHON=.venv/bin/python
fi

# A GPU takes the brief's models from the hub; a CPU the small ones that need no hub.
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    export LLAMA_ID=${LLAMA_ID:-meta-llama/Meta-Llama-3.1-8B-Instruct} QWEN_ID=${QWEN_ID:-Qwen/Qwen2.5-7B-Instruct}
fi
export LLAMA_ID=${LLAMA_ID:-offline:smollm2-135m-instruct}
export QWEN_ID=${QWEN_ID:-offline:qwen2.5-coder-0.5b-instruct}

# show NAME...: prints the settings that this run uses.
show() {
    echo "== $(basename "$0")"
    for name in "$@"; do printf '%-15s %s\n' "$name" "${!name}"; done
}

# logged COMMAND...: runs it and keeps everything it prints in a timestamped file under OUTPUT_DIR.
logged() {
    if ! mkdir -p "$OUTPUT_DIR" 2>/dev/null || [ ! -w "$OUTPUT_DIR" ]; then
        echo "error: OUTPUT_DIR=$OUTPUT_DIR cannot be written; choose another folder" >&2
        exit 2
    fi
    "$@" 2>&1 | tee -i -a "$OUTPUT_DIR/$(date +%Y%m%d-%H%M%S).log"
}

# evaluate CONDITIONS: the evaluation of these conditions with the settings of the environment, then its table.
evaluate() {
    DATASET=${DATASET:-squad} SOURCE=${SOURCE:-prompt} SAMPLES=${SAMPLES:-} SEED=${SEED:-0}
    LATENT_LEN=${LATENT_LEN:-32} D_Z=${D_Z:-256} CODEC=${CODEC:-fp16} LLMS=${LLMS:-llama,qwen} DTYPE=${DTYPE:-}
    MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-12} BATCH_SIZE=${BATCH_SIZE:-32} FRESH_EVAL=${FRESH_EVAL:-0} CONDITIONS=$1
    show LLAMA_ID QWEN_ID LLMS DATASET SOURCE SAMPLES SEED LATENT_LEN D_Z CODEC CONDITIONS MAX_NEW_TOKENS \
        BATCH_SIZE DTYPE FRESH_EVAL OUTPUT_DIR
    local extra=()
    case "$FRESH_EVAL" in
        0) ;;
        1) extra+=(--fresh_eval) ;;
        *) echo "error: FRESH_EVAL=$FRESH_EVAL: 1 starts over, 0 continues" >&2; exit 2 ;;
    esac
    [ -z "$SAMPLES" ] || extra+=(--samples "$SAMPLES")
    logged "$PYTHON" -u latentwire/eval.py --dataset "$DATASET" --source "$SOURCE" \
        --seed "$SEED" --latent_len "$LATENT_LEN" --d_z "$D_Z" --codec "$CODEC" --llms "$LLMS" --dtype "$DTYPE" \
        --max_new_tokens "$MAX_NEW_TOKENS" --batch_size "$BATCH_SIZE" --conditions "$CONDITIONS" \
        --save_dir "$OUTPUT_DIR" ${extra[@]+"${extra[@]}"}
    logged "$PYTHON" -u latentwire/report.py "$OUTPUT_DIR"
}

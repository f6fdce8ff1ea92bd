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
    CKPT=${CKPT:-} TUNED=${TUNED:-} REUSE=${REUSE:-} CODEC=${CODEC:-fp16} LLMS=${LLMS:-llama,qwen} DTYPE=${DTYPE:-}
    MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-12} BATCH_SIZE=${BATCH_SIZE:-32} FRESH_EVAL=${FRESH_EVAL:-0} CONDITIONS=$1
    if [ -z "$CKPT" ]; then LATENT_LEN=${LATENT_LEN:-32} D_Z=${D_Z:-256}; fi  # a checkpoint knows its own
    LATENT_LEN=${LATENT_LEN:-} D_Z=${D_Z:-}
    show LLAMA_ID QWEN_ID LLMS DATASET SOURCE SAMPLES SEED LATENT_LEN D_Z CODEC CONDITIONS MAX_NEW_TOKENS \
        BATCH_SIZE DTYPE CKPT TUNED REUSE FRESH_EVAL OUTPUT_DIR
    local extra=()
    case "$FRESH_EVAL" in
        0) ;;
        1) extra+=(--fresh_eval) ;;
        *) echo "error: FRESH_EVAL=$FRESH_EVAL: 1 starts over, 0 continues" >&2; exit 2 ;;
    esac
    [ -z "$SAMPLES" ] || extra+=(--samples "$SAMPLES")
    [ -z "$LATENT_LEN" ] || extra+=(--latent_len "$LATENT_LEN")
    [ -z "$D_Z" ] || extra+=(--d_z "$D_Z")
    logged "$PYTHON" -u latentwire/eval.py --ckpt "$CKPT" --tuned "$TUNED" --reuse "$REUSE" --dataset "$DATASET" \
        --source "$SOURCE" --seed "$SEED" --codec "$CODEC" --llms "$LLMS" --dtype "$DTYPE" \
        --max_new_tokens "$MAX_NEW_TOKENS" --batch_size "$BATCH_SIZE" --conditions "$CONDITIONS" \
        --save_dir "$OUTPUT_DIR" ${extra[@]+"${extra[@]}"}
    logged "$PYTHON" -u latentwire/report.py "$OUTPUT_DIR"
}

# train STAGE OUTPUT [FLAG...]: one stage of training with the settings of the environment; it continues where it was.
train() {
    local stage=$1 output=$2
    shift 2
    case "$RESUME" in
        0) ;;
        1) set -- --resume "$@" ;;
        *) echo "error: RESUME=$RESUME: 1 continues, 0 refuses a folder that holds a run" >&2; exit 2 ;;
    esac
    [ -z "$SAMPLES" ] || set -- --samples "$SAMPLES" "$@"
    local machines
    read -ra machines <<<"$RENDEZVOUS"
    logged "$PYTHON" -u -m torch.distributed.run "${machines[@]}" --nproc_per_node="$NPROC" latentwire/train.py \
        --stage "$stage" --save_dir "$output" --dataset "$DATASET" --source "$SOURCE" --seed "$SEED" --llms "$LLMS" \
        --dtype "$DTYPE" --batch_size "$BATCH_SIZE" --latent_len "$LATENT_LEN" --d_z "$D_Z" --k "$K" \
        --interface "$INTERFACE" --encoder_type "$ENCODER_TYPE" --encoder_id "$ENCODER_ID" --pooling "$POOLING" --lr "$LR" \
        --first_token_ce_weight "$FIRST_TOKEN_CE_WEIGHT" --kd_weight "$KD_WEIGHT" --span_weight "$SPAN_WEIGHT" \
        --val_samples "$VAL_SAMPLES" --max_new_tokens "$MAX_NEW_TOKENS" "$@"
}

# training_settings NAME...: the defaults of all that `train` reads, shown with the caller's own NAMEs. A CPU gets
# fewer, smaller steps and no teacher, whose reading of the full texts would take longer than everything else.
training_settings() {
    local epochs=2 batch=16 kd=0 processes=1
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        epochs=3 batch=32 kd=0.5 processes=$(nvidia-smi -L | wc -l)
    fi
    NPROC=${NPROC:-$processes} RENDEZVOUS=${RENDEZVOUS:---standalone} EPOCHS=${EPOCHS:-$epochs} BATCH_SIZE=${BATCH_SIZE:-$batch} KD_WEIGHT=${KD_WEIGHT:-$kd}
    DATASET=${DATASET:-squad} SOURCE=${SOURCE:-prompt} SAMPLES=${SAMPLES:-} VAL_SAMPLES=${VAL_SAMPLES:-100}
    SEED=${SEED:-0} LLMS=${LLMS:-llama,qwen} DTYPE=${DTYPE:-} LATENT_LEN=${LATENT_LEN:-32} D_Z=${D_Z:-256} K=${K:-4}
    INTERFACE=${INTERFACE:-closed_form} ENCODER_TYPE=${ENCODER_TYPE:-hf} ENCODER_ID=${ENCODER_ID:-offline:all-minilm-l6-v2} POOLING=${POOLING:-select}
    LR=${LR:-5e-4} FIRST_TOKEN_CE_WEIGHT=${FIRST_TOKEN_CE_WEIGHT:-0.5} SPAN_WEIGHT=${SPAN_WEIGHT:-1.0}
    MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-12} RESUME=${RESUME:-1}
    show LLAMA_ID QWEN_ID LLMS DATASET SOURCE SAMPLES EPOCHS BATCH_SIZE NPROC RENDEZVOUS SEED LATENT_LEN D_Z INTERFACE ENCODER_TYPE \
        ENCODER_ID POOLING LR FIRST_TOKEN_CE_WEIGHT K KD_WEIGHT SPAN_WEIGHT VAL_SAMPLES DTYPE RESUME OUTPUT_DIR "$@"
}

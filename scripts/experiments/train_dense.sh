#!/usr/bin/env bash
# Train latents of a text that nobody has asked about yet (SOURCE=context): one encoding for all its questions. Each step draws
# its M among LATENT_LENS, so that one checkpoint serves all of them. ARMS:
#   lead        led by the first M tokens, with a residual made from what follows them; the adapters also change keys and
#               values of each layer
#   first       the same M tokens' codes alone
#   first_deep  these codes with the adapters of lead: what a latent holds beyond its token is what lead has more
#   dense       led by one token of each window of the text, with a residual of the window, and the same adapters as lead
#   codes       the same tokens' codes alone
#   windows     the mean of each window, and the same adapters as lead
#   budget      text cut to M tokens, behind a soft prompt of its own at each M
# Which token leads a window begins as the rarest. It is learned first, without an LLM, from the answer spans of all questions
# on a text at once (SCORES_SAMPLES of them), and, with SPAN_WEIGHT, while an arm is trained. The teacher (KD_WEIGHT above 0)
# reads the whole text behind a soft prompt that is tuned first. On a GPU: all questions, three passes; on a CPU 16,000
# questions, one pass; it prints which before it starts. Judged on dev questions behind the first SKIP, or on those of IDS,
# beside plain text, whole and of as many tokens. AT_ONCE arms run at a time. Killed and started again it continues.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
export DTYPE=${DTYPE:-native}
show dense
export SOURCE=context LLMS K OUTPUT_DIR
export -n SAMPLES SKIP LATENT_LENS FIRST_LATENT_LEN CONTINUATION_SHARE KD_WEIGHT TEACHER SCORES_SAMPLES  # of the arms alone

# kind_of ARM: what its adapters and its encoder are.
kind_of() {
    adapters=deep kind=(--encoder_type anchors)
    case "$1" in
        lead | windows) kind=(--encoder_type "$1") ;;
        first_deep) kind=(--encoder_type codebook) ;;
        first) adapters=preamble kind=(--encoder_type codebook) ;;
        dense) ;;
        codes) adapters=preamble kind+=(--no-dense) ;;
        budget) ;;
        *) echo "error: ARMS: $1 is not known; choose among lead, first, first_deep, dense, codes, windows, budget" >&2 && exit 2 ;;
    esac
}
for one in $ARMS; do kind_of "$one"; done

# at CONDITION: it at each M.
at() { echo "$1@${LATENT_LENS//,/,$1@}"; }

IFS=, read -ra each <<<"$LATENT_LENS"
middle=${each[${#each[@]} / 2]}  # M of the validations
judged=(--samples "$EVAL_SAMPLES" --skip "$SKIP")
[ -z "$IDS" ] || judged=(--ids "$IDS")
program eval --conditions "text,$(at token_budget)" "${judged[@]}" --save_dir "$OUTPUT_DIR/rivals"
how=(--samples "$SAMPLES" --epochs "$EPOCHS" --kd_weight "$KD_WEIGHT")
lens=(--latent_len "$middle" --latent_lens "$LATENT_LENS")
more=(--continuation_share "$CONTINUATION_SHARE")
[ -z "$FIRST_LATENT_LEN" ] || more+=(--first_latent_len "$FIRST_LATENT_LEN")
if [[ $KD_WEIGHT =~ [1-9] ]]; then
    train --stage text_tuned --samples "$TEACHER_SAMPLES" --epochs 1 --kd_weight 0 --save_dir "$OUTPUT_DIR/teacher"
    how+=(--teacher "$OUTPUT_DIR/teacher/checkpoint_best")
fi

# learns_scores ARM: whether which token leads its windows is learned before.
learns_scores() { [[ "$1" =~ ^(dense|codes)$ && $SCORES_SAMPLES =~ [1-9] ]]; }

# learn_scores SEED: that training, without an LLM.
learn_scores() {
    train --stage scores --encoder_type anchors --no-dense --init "$OUTPUT_DIR/codebook/checkpoint_best" --seed "$1" \
        --samples "$SCORES_SAMPLES" --epochs 1 "${lens[@]}" --kd_weight 0 --save_dir "$OUTPUT_DIR/seed$1/scores"
}

# begin FOLDER [FLAG...]: codes and adapters in closed form.
begin() { train --stage codebook --adapter_type "$adapters" --kd_weight 0 --save_dir "$@"; }

# arm NAME SEED: its training and its evaluation.
arm() {
    kind_of "$1"
    local folder=$OUTPUT_DIR/seed$2/$1 codes=$OUTPUT_DIR/codebook_$adapters m
    if [ "$1" = budget ]; then
        for m in "${each[@]}"; do
            train --stage token_budget_tuned --latent_len "$m" --seed "$2" "${how[@]}" --save_dir "$folder/M$m/token_budget_tuned"
            program eval --tuned "$folder/M$m" --conditions "token_budget_tuned@$m" "${judged[@]}" --save_dir "$folder/M$m/eval"
        done
        return
    fi
    if learns_scores "$1"; then
        codes=$folder/codebook
        begin "$codes" "${kind[@]}" --init "$OUTPUT_DIR/seed$2/scores/checkpoint_best"
    fi
    train --stage joint "${kind[@]}" --init "$codes/checkpoint_best" --seed "$2" "${how[@]}" "${lens[@]}" "${more[@]}" \
        --save_dir "$folder"
    program eval --ckpt "$folder/checkpoint_best" --conditions "$(at latentwire),shuffled_z@$middle" "${judged[@]}" \
        --save_dir "$folder/eval"
}

# of PATH: the evaluations in it, of all seeds, as compare.py takes them.
of() {
    local folders
    folders=$(for seed in $SEEDS; do printf ",%s" "$OUTPUT_DIR/seed$seed/$1/eval"; done)
    echo "${folders:1}"
}

scored=
for one in $ARMS; do # what several arms begin from
    kind_of "$one"
    if learns_scores "$one"; then
        scored=1
    elif [ "$one" != budget ]; then
        begin "$OUTPUT_DIR/codebook_$adapters"
    fi
done
if [ -n "$scored" ]; then
    train --stage codebook --kd_weight 0 --save_dir "$OUTPUT_DIR/codebook"
    for seed in $SEEDS; do beside "seed$seed/scores" learn_scores "$seed"; done
    all_done
fi
for seed in $SEEDS; do
    for one in $ARMS; do beside "seed$seed/$one" arm "$one" "$seed"; done
done
all_done
runs=() apart=()  # questions whose answer is among one arm's tokens (of one seed; others differ a little), and the others
for one in $ARMS; do
    case "$one" in
        budget) for m in "${each[@]}"; do runs+=("$(of "budget/M$m"):token_budget_tuned"); done ;;
        *) runs+=("$(of "$one")") ;;
    esac
    case "$one" in
        dense | codes | lead) apart=(--selection "$OUTPUT_DIR/seed${SEEDS%% *}/$one/checkpoint_best") ;;
    esac
done
program compare "${runs[@]}" "$OUTPUT_DIR/rivals:token_budget" "$OUTPUT_DIR/rivals:text" "${apart[@]}" --pair_seeds --save_dir "$OUTPUT_DIR"

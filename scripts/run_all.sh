#!/usr/bin/env bash
# Everything in one command: the baselines, the training of their rivals' soft prompts and of LatentWire, one evaluation
# that pairs all of them on the same EVAL_SAMPLES questions, the page, and last the three critical tests. The plan and
# the time it takes come first; --dry-run stops there. Killed and started again it continues. TRAINED_RIVALS=0 leaves
# the soft prompts out: on a CPU the one before the whole text takes longer than everything else.
set -euo pipefail
source "$(dirname "$0")/common.sh"
case "$*" in
    '' | --dry-run) ;;
    *) echo "error: $*: only --dry-run is known here; settings are variables, for example SAMPLES=1000" >&2; exit 2 ;;
esac
OUTPUT_DIR=${OUTPUT_DIR:-runs/all}
EVAL_SAMPLES=${EVAL_SAMPLES:-1000} SCORES_EPOCHS=${SCORES_EPOCHS:-3} SCORES_SAMPLES=${SCORES_SAMPLES:-${SAMPLES:-}}
TRAINED_RIVALS=${TRAINED_RIVALS:-1}
training_settings SCORES_EPOCHS SCORES_SAMPLES EVAL_SAMPLES TRAINED_RIVALS
case "$TRAINED_RIVALS" in
    0) rivals=() ;;
    1) rivals=(token_budget_tuned text_tuned) ;;
    *) echo "error: TRAINED_RIVALS=$TRAINED_RIVALS: 1 trains the rivals' soft prompts, 0 leaves them out" >&2; exit 2 ;;
esac
all=$OUTPUT_DIR
baselines=text,token_budget,token_budget@$((2 * LATENT_LEN)),token_budget_context,token_select,pca,pca_pool,pca_rank
baselines+=,no_context
learned=latentwire,untrained,shuffled_z
if [ "$ENCODER_TYPE" = hf ]; then learned+=,selected_text; fi
if [ "$ENCODER_TYPE $SOURCE" = 'hf prompt' ]; then learned+=,encoder_only; fi
for rival in ${rivals[@]+"${rivals[@]}"}; do learned+=,$rival; done

# planned FILE WHAT: a line of the plan; FILE is there when the step has ended.
planned() { printf '  %-8s  %-26s %s\n' "$([ -e "$all/$1" ] && echo done || echo 'to do')" "${1%/*}" "$2"; }

# minutes WHAT COMMAND...: how long a program says that it would take, added to the total.
minutes() {
    local what=$1 said
    shift
    said=$("$@" 2>&1) || { printf '%s\n' "$said" >&2; exit 1; }
    said=$(sed -n 's/^estimate: \([0-9]*\) minutes.*/\1/p' <<<"$said")
    printf '  %4d min  %s\n' "${said:?no estimate for $what}" "$what"
    total=$((total + said))
}

echo "plan, in $all:"
planned baselines/results.json "$baselines"
for rival in ${rivals[@]+"${rivals[@]}"}; do planned "tuned/$rival/loss.png" 'soft prompts'; done
planned latentwire/loss.png 'codebook, scores, adapters, joint'
planned eval/results.json "$learned, with the baselines, on the same questions"
if [ ! -e "$all/eval/results.json" ]; then
    echo "timing a few steps of each; what is done will not be repeated, but is counted here ..."
    total=0 trial=$(mktemp -d)
    trap 'rm -rf "$trial"' EXIT
    OUTPUT_DIR=$trial begun=$trial/codebook/checkpoint_best
    said=$(train codebook "$trial/codebook" 2>&1) || { printf '%s\n' "$said" >&2; exit 1; }
    for rival in ${rivals[@]+"${rivals[@]}"}; do
        minutes "tuned/$rival" train "$rival" "$trial/tuned" --epochs "$EPOCHS" --estimate
    done
    if [ "$ENCODER_TYPE" = hf ]; then
        SAMPLES=$SCORES_SAMPLES minutes 'latentwire, token scores' \
            train scores "$trial/scores" --init "$begun" --epochs "$SCORES_EPOCHS" --estimate
    fi
    minutes 'latentwire, through the LLMs' \
        train joint "$trial/joint" --init "$begun" --epochs "$EPOCHS" --estimate
    minutes 'baselines and eval' "$PYTHON" -u latentwire/eval.py --ckpt "$begun" --tuned "$trial" --estimate \
        --conditions "$baselines,$learned" --samples "$EVAL_SAMPLES" --dataset "$DATASET" --source "$SOURCE" \
        --llms "$LLMS" --dtype "$DTYPE" --max_new_tokens "$MAX_NEW_TOKENS" --batch_size "$BATCH_SIZE"
    printf '  %4d min  altogether\n' "$total"
fi
if [ "$*" = --dry-run ]; then exit; fi

OUTPUT_DIR=$all/baselines SAMPLES=$EVAL_SAMPLES CKPT='' evaluate "$baselines"
for rival in ${rivals[@]+"${rivals[@]}"}; do
    OUTPUT_DIR=$all/tuned train "$rival" "$all/tuned/$rival" --epochs "$EPOCHS"
done
PYTHON=$PYTHON OUTPUT_DIR=$all/latentwire bash scripts/experiments/train_latentwire.sh
OUTPUT_DIR=$all/eval SAMPLES=$EVAL_SAMPLES CKPT=$all/latentwire/checkpoint_best TUNED=${rivals:+$all/tuned} \
    REUSE=$all/baselines evaluate "$baselines,$learned"
OUTPUT_DIR=$all logged "$PYTHON" -u latentwire/report.py "$all/eval" "$all/latentwire" ${rivals:+"$all/tuned"} \
    --html "$all/report.html"
echo 'the critical tests:'
sed -n '/^```text$/,/^```$/{//!p}' "$all/eval/table.md"

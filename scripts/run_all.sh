#!/usr/bin/env bash
# Everything in one command: the baselines, the training of their rivals' soft prompts and of LatentWire, one evaluation
# that pairs all of them on the same EVAL_SAMPLES questions, the page, and last the three critical tests. The plan and
# the time it takes come first; --dry-run stops there. Killed and started again it continues. TRAINED_RIVALS=0 leaves
# the soft prompts out: on a CPU the one before the whole text takes longer than everything else.
set -euo pipefail
takes_flags=1
source "$(dirname "$0")/common.sh"
show suite
exec "$PYTHON" -u latentwire/suite.py "$@"

#!/usr/bin/env bash
# The upper bound: both LLMs read the whole text. Beside it, the floor: they read nothing.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
export OUTPUT_DIR=${OUTPUT_DIR:-runs/baselines/text}
evaluate --conditions text,no_context

#!/usr/bin/env bash
# Both LLMs read the whole text (no upper bound: docs/evaluation.md). Beside it, the floor: they read nothing.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
export OUTPUT_DIR=${OUTPUT_DIR:-runs/baselines/text}
evaluate --conditions text,no_context

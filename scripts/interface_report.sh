#!/usr/bin/env bash
# What the untrained codes carry, per LLM: nearest-token recall, explained variance, and how well the window around the
# reference answer is read, as text and through the wire, with the question as text.
set -euo pipefail
source "$(dirname "$0")/common.sh"
export OUTPUT_DIR=${OUTPUT_DIR:-runs/interface} SOURCE=context
evaluate --conditions oracles

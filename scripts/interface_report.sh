#!/usr/bin/env bash
# What the untrained interface can carry, per LLM: nearest-token recall, explained variance, and the reading ceiling
# (the window around the reference answer, as text and through the wire, with the question as text).
set -euo pipefail
source "$(dirname "$0")/common.sh"
OUTPUT_DIR=${OUTPUT_DIR:-runs/interface}
SOURCE=context
evaluate oracle_text,oracle_wire

#!/usr/bin/env bash
# Train and evaluate every combination of LATENT_LENS, D_ZS, FTCE_WEIGHTS and KS, and rank them on questions that are not
# trained on. Killed and started again it continues, and tries failed ones once more. --dry-run prints all and the time.
set -euo pipefail
takes_flags=1
source "$(dirname "$0")/../common.sh"
show sweep
export OUTPUT_DIR
program sweep "$@"

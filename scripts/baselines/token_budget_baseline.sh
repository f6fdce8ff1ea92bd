#!/usr/bin/env bash
# The fair rival: as many text tokens as LatentWire has latents (LATENT_LEN), chosen in three ways.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
LATENT_LEN=${LATENT_LEN:-32}
OUTPUT_DIR=${OUTPUT_DIR:-runs/baselines/token_budget/M$LATENT_LEN}
evaluate token_budget,token_budget_context,token_select

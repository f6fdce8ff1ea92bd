#!/usr/bin/env bash
# The fair rival: as many text tokens as LatentWire has latents (LATENT_LEN), chosen in three ways.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
places=$(setting eval latent_len)
export OUTPUT_DIR=${OUTPUT_DIR:-runs/baselines/token_budget/M$places}
evaluate --conditions token_budget,token_budget_context,token_select

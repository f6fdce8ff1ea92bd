#!/usr/bin/env bash
# Linear compression of the LLM's own text embeddings: if this is as good, nothing needs to be learned.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
LATENT_LEN=${LATENT_LEN:-32}
OUTPUT_DIR=${OUTPUT_DIR:-runs/baselines/pca/M$LATENT_LEN}
evaluate pca,pca_pool,pca_rank

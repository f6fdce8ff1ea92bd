#!/usr/bin/env bash
# Linear compression of the LLM's own text embeddings: if this is as good, nothing needs to be learned.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
places=$(setting eval latent_len)
export OUTPUT_DIR=${OUTPUT_DIR:-runs/baselines/pca/M$places}
evaluate --conditions pca,pca_pool,pca_rank

#!/usr/bin/env bash
# Documents to a corpus of wires (docs/using.md). Flags as latentwire/encode_corpus.py has them, or variables (CODEC,
# TEXT_COLUMN, WORKERS, ...). Killed and started again it continues.
set -euo pipefail
takes_flags=1
source "$(dirname "$0")/common.sh"
needs corpus ray pandas pyarrow
show encode_corpus >&2
exec "$PYTHON" -u latentwire/encode_corpus.py "$@"

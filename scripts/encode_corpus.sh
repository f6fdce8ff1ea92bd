#!/usr/bin/env bash
# Documents to a corpus of wires (docs/using.md). Flags as latentwire/encode_corpus.py has them, or variables (CODEC,
# TEXT_COLUMN, WORKERS, ...). Killed and started again it continues.
set -euo pipefail
source "$(dirname "$0")/common.sh"
"$PYTHON" -c "import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, 'ray pandas pyarrow'.split())))" ||
    "$PYTHON" -m pip install --disable-pip-version-check --editable ".[corpus]" >&2
show encode_corpus >&2
exec "$PYTHON" -u latentwire/encode_corpus.py "$@"

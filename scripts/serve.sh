#!/usr/bin/env bash
# The service and its page. Settings by variables (CKPT, BIND, PORT, ROLE, BATCH, ...) or flags. Ctrl+C or SIGTERM ends it
# once it has finished what it was asked.
set -euo pipefail
source "$(dirname "$0")/common.sh"
"$PYTHON" -c "import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, 'fastapi gradio httpx prometheus_client psutil uvicorn'.split())))" ||
    "$PYTHON" -m pip install --disable-pip-version-check --editable ".[serve]" >&2
show serve >&2
exec "$PYTHON" -u latentwire/serve.py "$@"

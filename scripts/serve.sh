#!/usr/bin/env bash
# The service and its page. Settings by variables (CKPT, BIND, PORT, ROLE, BATCH, ...) or flags. Ctrl+C or SIGTERM ends it
# once it has finished what it was asked.
set -euo pipefail
takes_flags=1
source "$(dirname "$0")/common.sh"
needs serve fastapi gradio httpx prometheus_client psutil uvicorn
show serve >&2
exec "$PYTHON" -u latentwire/serve.py "$@"

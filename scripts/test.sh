#!/usr/bin/env bash
# All tests, in the environment that the quickstart uses; arguments go to pytest.
set -euo pipefail
bash "$(dirname "$0")/setup_env.sh"
unset CDPATH
cd "$(dirname "$0")/.."
.venv/bin/ruff check --quiet .
exec .venv/bin/python -m pytest "$@"

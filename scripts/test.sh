#!/usr/bin/env bash
# All tests, in the environment that the quickstart uses. Without arguments several files are tested at a time, each
# with one thread; arguments go to pytest.
set -euo pipefail
bash "$(dirname "$0")/setup_env.sh"
unset CDPATH
cd "$(dirname "$0")/.."
.venv/bin/ruff check --quiet .
if [ $# -eq 0 ]; then
    export OMP_NUM_THREADS=1
    set -- --numprocesses auto --maxprocesses 4 --dist loadfile  # the tests of a file share what it trains
fi
exec .venv/bin/python -m pytest "$@"

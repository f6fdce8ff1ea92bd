#!/usr/bin/env bash
# All tests, in the environment that the quickstart uses. Without arguments several files are tested at a time, each
# with one thread, and one more than there are processors, since tests also wait; arguments go to pytest.
set -euo pipefail
bash "$(dirname "$0")/setup_env.sh"
unset CDPATH
cd "$(dirname "$0")/.."
.venv/bin/ruff check --quiet .
if [ $# -eq 0 ]; then
    export OMP_NUM_THREADS=1
    # The tests of a file share what it trains; which files come first is said in tests/conftest.py.
    at_once=$(($(getconf _NPROCESSORS_ONLN) + 1))
    set -- --numprocesses "$at_once" --maxprocesses 4 --dist loadfile --no-loadscope-reorder
fi
exec .venv/bin/python -m pytest "$@"

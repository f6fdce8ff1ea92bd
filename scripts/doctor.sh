#!/usr/bin/env bash
# What this machine has, what will run on it, and what to set: latentwire/doctor.py, in whatever Python there is. It
# makes nothing, .venv included. Status 0 when the quickstart would run, else 1. --json, --gpu as the program has them.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
if [ -z "${PYTHON:-}" ] && [ ! -x "$python" ]; then python=${BASE_PYTHON:-python3}; fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "missing  Python       $python is not Python 3.11 or newer; set BASE_PYTHON to one that is" >&2
    exit 1
fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" latentwire/doctor.py "$@"

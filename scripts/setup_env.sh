#!/usr/bin/env bash
# Makes .venv with everything that requirements.txt names. Run again, it does nothing unless requirements.txt changed, or
# the Python is gone that .venv was made with.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base=${BASE_PYTHON:-python3}
if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $base is not Python 3.11 or newer; set BASE_PYTHON to one that is" >&2
    exit 2
fi

stamp=.venv/.installed-requirements
installed() { cmp -s <(cat requirements.txt pyproject.toml) "$stamp" && .venv/bin/python -c 'import pip' 2>/dev/null; }
if ! installed && command -v flock >/dev/null; then
    exec 9>.venv.lock  # scripts that start together set it up once
    flock 9
fi
if ! installed; then
    echo "setting up .venv (a few minutes the first time) ..."
    "$base" -m venv $(.venv/bin/python -c 'import pip' 2>/dev/null || echo --clear) .venv || { echo "error: cannot make .venv; install Python's venv module" >&2; exit 2; }
    .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
    .venv/bin/python -m pip install --disable-pip-version-check --no-deps --editable .
    # Written last: an interrupted set-up is done again.
    cat requirements.txt pyproject.toml >"$stamp"
fi

#!/usr/bin/env bash
# What the service bears, as ratios: one that works on requests together (BATCH) beside one that takes them one by one.
# Both are started here, on free ports of this machine, and ended again.
set -euo pipefail
takes_flags=1
source "$(dirname "$0")/common.sh"
if [[ " $* " == *" -h "* || " $* " == *" --help "* ]]; then exec "$PYTHON" latentwire/load_test.py --help; fi
"$PYTHON" -c 'from latentwire.service.settings import LoadSettings
from latentwire.utils.cli import parse, run
run(lambda: parse(LoadSettings))' "$@"  # a wrong setting is told before anything starts
needs serve fastapi gradio httpx prometheus_client psutil uvicorn
show load_test
export OUTPUT_DIR
mkdir -p "$OUTPUT_DIR"

pids=()
trap '[ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true; wait' EXIT

# start NAME [FLAG...]: a service, whose log is NAME.log.
start() {
    BIND=127.0.0.1 PORT=0 PAGE=0 ROLE=both "$PYTHON" -u latentwire/serve.py "${@:2}" 2>"$OUTPUT_DIR/$1.log" &
    pids+=($!)
}

# address NAME PID: where it listens, once it does.
address() {
    local found=""
    while [ -z "$found" ]; do
        kill -0 "$2" 2>/dev/null || { tail -n 3 "$OUTPUT_DIR/$1.log" >&2; exit 2; }
        sleep 0.5
        found=$(sed -n 's/^serving .* on \(http[^ ]*\) .*/\1/p' "$OUTPUT_DIR/$1.log")
    done
    echo "$found"
}

start together
start one --batch 1
url=$(address together "${pids[0]}")
one_url=$(address one "${pids[1]}")
program load_test --url "$url" --one_url "$one_url" "$@"

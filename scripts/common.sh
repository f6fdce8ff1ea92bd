# Sourced by every launcher: strict shell, repository root, Python, logs. It holds no setting: Python declares them all
# (`python latentwire/settings.py train`), and programs read the environment themselves.
# shellcheck shell=bash
set -euo pipefail
unset CDPATH
given=("$@")
if [ $# -gt 0 ] && [ -z "${takes_flags:-}" ]; then
    if [[ $1 == -h || $1 == --help ]]; then sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0" && exit; fi
    echo "error: $(basename "$0") takes no flags ($1): set variables instead, SAMPLES=100 for --samples 100 (docs/settings.md)" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export LATENTWIRE_LAUNCHER="${LATENTWIRE_LAUNCHER:+$LATENTWIRE_LAUNCHER }$$"  # programs end with it (utils/launcher.py)

# The environment is made on first use; PYTHON names another interpreter that has everything.
if [ -z "${PYTHON:-}" ]; then
    bash scripts/setup_env.sh
    PYTHON=.venv/bin/python
fi
export PYTHON

# setting PROGRAM NAME: what a setting is now, environment included.
setting() { "$PYTHON" latentwire/settings.py "$@"; }

# settings PROGRAM: sets the variable of each of its settings that has none, and `declared`, which is a line for each.
settings() {
    local name value
    declared=$(setting "$1")
    while read -r name value; do
        [ -n "${!name-}" ] || { export -n "$name" && printf -v "$name" %s "$value"; }  # programs see what the user set
    done <<<"$declared"
}

# show PROGRAM: the same, and prints the settings that this run uses; flags of the script win over them.
show() {
    settings "$1"
    printf '== %s\n%s\n' "$(basename "$0")${given[*]:+ ${given[*]}}" "$declared"
}

# needs EXTRA PACKAGE...: installs an extra of this project where one of its packages is missing.
needs() {
    "$PYTHON" -c "import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1:])))" "${@:2}" ||
        "$PYTHON" -m pip install --disable-pip-version-check --editable ".[$1]" >&2
}

# logged COMMAND...: runs it and keeps everything it prints in a timestamped file under OUTPUT_DIR.
logged() {
    if ! mkdir -p "$OUTPUT_DIR" 2>/dev/null || [ ! -w "$OUTPUT_DIR" ]; then
        echo "error: OUTPUT_DIR=$OUTPUT_DIR cannot be written; choose another folder" >&2
        exit 2
    fi
    if [ -n "${own_log:-}" ]; then "$@"; return; fi
    "$@" 2>&1 | tee -i -a "$OUTPUT_DIR/$(date +%Y%m%d-%H%M%S).log"
}

# program NAME [FLAG...]: latentwire/NAME.py, logged.
program() { logged "$PYTHON" -u "latentwire/$1.py" "${@:2}"; }

# evaluate [FLAG...]: an evaluation into OUTPUT_DIR, then its tables, chart and page.
evaluate() {
    show eval
    program eval "$@"
    program report "$OUTPUT_DIR"
}

# train FLAG...: a training under torchrun, logged; it continues where it was.
train() {
    local machines
    settings launch
    read -ra machines <<<"$RENDEZVOUS"
    logged "$PYTHON" -u -m latentwire.utils.launcher torch.distributed.run "${machines[@]}" \
        --nproc_per_node="$NPROC" latentwire/train.py "$@"
}

# beside NAME COMMAND...: runs it while the script goes on, AT_ONCE of them at a time. What it prints is in
# OUTPUT_DIR/NAME.log. Each has its share of the cores, and one GPU in turn. With AT_ONCE=1 it is simply run.
declare -A beside=()  # names, by process
places=()             # the process of each place
beside() {
    local name=$1 log=$OUTPUT_DIR/$1.log place cards
    shift
    if [ "$AT_ONCE" -eq 1 ]; then "$@"; return; fi
    while :; do
        for ((place = 0; place < AT_ONCE; place++)); do
            kill -0 "${places[place]:-none}" 2>/dev/null || break 2
        done
        sleep 0.2
    done
    IFS=, read -ra cards <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -x '[0-9]*' | paste -sd,)}"
    if [ "${DEVICE:-}" = cpu ]; then cards=(); fi
    mkdir -p "$(dirname "$log")"
    echo "$name: begun, its log is $log"
    {
        (
            own_log=1
            if [ ${#cards[@]} -gt 0 ]; then
                export CUDA_VISIBLE_DEVICES=${cards[place % ${#cards[@]}]// /} NPROC=1
            fi
            export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > AT_ONCE ? $(nproc) / AT_ONCE : 1))}
            "$@"
        ) >>"$log" 2>&1
        echo "$name: done"
    } &
    places[place]=$! beside[$!]=$name
}

# all_done: waits for what runs beside the script, and ends it where something failed.
all_done() {
    local process failed=
    for process in "${!beside[@]}"; do
        wait "$process" || failed+=" $OUTPUT_DIR/${beside[$process]}.log"
    done
    beside=()
    if [ -n "$failed" ]; then
        echo "error: failed, and the log says why:$failed (what was finished stays; the same command goes on)" >&2
        exit 1
    fi
}

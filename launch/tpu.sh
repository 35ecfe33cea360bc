#!/usr/bin/env bash
# Manages a TPU VM slice: creates it, sets it up, runs a command on all its workers and restarts it after preemptions, and
# deletes the slice.
set -euo pipefail

# shellcheck source=launch/command_line.sh
source "$(dirname "${BASH_SOURCE[0]}")/command_line.sh"
# shellcheck source=launch/tpu_resume.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_resume.sh"

usage() {
    cat <<'HELP'
usage: launch/tpu.sh VERB --name NAME --zone ZONE [OPTIONS] [-- COMMAND...]

  create   make the slice (needs --type)
  setup    sync, and make a Python environment on every worker
  sync     copy this working tree to every worker; runs, logs and the environment there stay
  run      start COMMAND on every worker, detached: it outlives the connection. Its output goes to a log there
  logs     show the end of the latest log
  status   the slice's state, and what each worker's run is doing or how it ended
  resume   run COMMAND until it is done: start it again after a preemption, a stop, a kill or a hang that its watchdog
           ended (train.on_hang abort), waiting longer each time. Its exit code is 0 when COMMAND succeeded, and that of
           COMMAND when it failed
  stop     tell the run to save and end (SIGTERM), and wait for that
  delete   delete the slice and its disks, after asking

  --name NAME        the slice                                  (or JAXBLOCK_TPU_NAME)
  --zone ZONE        for example us-east5-a                     (or JAXBLOCK_TPU_ZONE)
  --project PROJECT  default: gcloud's own                      (or JAXBLOCK_TPU_PROJECT)
  --type TYPE        create, resume --recreate: accelerator type, as v6e-8, v5litepod-16 (v5e-16 will do), v5p-8
                     (or JAXBLOCK_TPU_TYPE)
  --version VERSION  VM image; default: the one for the type     (or JAXBLOCK_TPU_VERSION)
  --spot             create: cheaper, and may be taken away at any time
  --queued           create, delete, status, resume: a queued resource of the same name, which waits for capacity:
                     setup once status says ACTIVE
  --env NAME         run, resume: COMMAND gets the value that this variable has here, for example WANDB_API_KEY; give the
                     option once for each variable. The value is sent in a file, which is deleted once read, and appears
                     on no command line
  --recreate         resume: delete a slice that was preempted, and only that, and create it again (--type, --spot, --queued)
  --retries N        resume: the most restarts, and the most checks in a row that may fail (default: 20)
  --backoff S        resume: seconds to wait before the first restart or repeated check, doubled each time up to 900 and
                     reset once a run has started (default: 30)
  --poll S           resume, stop: seconds between two checks of the slice and the run (default: 60)
  --worker WORKER    setup, sync, run, status, stop: which workers (default: all); logs: whose (default: 0)
  --lines N          logs: how many lines (default: 50)
  --follow           logs: keep printing as the log grows
  --yes              delete: do not ask
  --dry-run          print every command, arguments quoted, and run nothing

example:
  launch/tpu.sh create --name pod --zone us-east5-a --type v6e-8 --spot
  launch/tpu.sh setup  --name pod --zone us-east5-a
  launch/tpu.sh run    --name pod --zone us-east5-a -- jaxblock train --config FILE --train.out gs://bucket/run
HELP
}

try_gcloud() {
    local group="$1" verb="$2"
    shift 2
    execute gcloud compute tpus "$group" "$verb" "$@" --zone="$zone" ${project:+--project="$project"}
}

tpu() {
    try_gcloud tpu-vm "$@" || fail "gcloud compute tpus tpu-vm $1 failed (above: why). --dry-run shows the command"
}

# on_workers COMMAND: runs a line of shell in the login shell of each worker.
on_workers() {
    tpu ssh "$name" --worker="$worker" --command="$1"
}

create() {
    [ -n "$type" ] || fail "create needs --type, for example --type v6e-8"
    # The product is called v5e, but its accelerator type is v5litepod.
    case "$type" in v5e-*) type="v5litepod-${type#v5e-}" ;; esac
    if [ -z "$version" ]; then
        case "$type" in
            v6e-*) version=v2-alpha-tpuv6e ;;
            v5p-*) version=v2-alpha-tpuv5 ;;
            v5litepod-*) version=v2-alpha-tpuv5-lite ;;
            *) version=tpu-ubuntu2204-base ;;
        esac
    fi
    local options=()
    if [ "$spot" = yes ]; then options=(--spot); fi
    local kind=(tpu-vm create "$name" --accelerator-type="$type" --version="$version")
    if [ "$queued" = yes ]; then
        kind=(queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version")
    fi
    try_gcloud "${kind[@]}" ${options[@]+"${options[@]}"} ||
        fail "gcloud compute tpus ${kind[0]} create failed (above: why). --dry-run shows the command"
}

# These lines of shell run on the workers. The working tree is unpacked over the old one, so that runs, logs and the
# environment are kept. The images ship Python 3.10 or older and jaxblock needs 3.11, so uv installs a Python: with it no
# package source has to be added and no apt lock waited for (a fresh image upgrades itself for minutes), and since uv comes from
# PyPI as one binary, no script from the web is piped into a shell. PIP_BREAK_SYSTEM_PACKAGES lets pip install uv where the
# image marks its Python as managed by the system.
# shellcheck disable=SC2016  # $HOME is expanded on the worker
remote_sync='set -eu
cd "$HOME"
mkdir -p jaxblock/logs
tar -xzf jaxblock.tar.gz -C jaxblock'
# shellcheck disable=SC2016
remote_setup='
cd "$HOME/jaxblock"
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet --upgrade uv
uv="$HOME/.local/bin/uv"
if [ ! -x .venv/bin/python ]; then "$uv" venv --quiet --python 3.12 .venv; fi
"$uv" pip install --quiet --python .venv/bin/python --constraint constraints-py312.txt --editable ".[gcs,wandb]" "jax[tpu]"
.venv/bin/python -c "import jax, jaxblock; print(\"worker ready: jax\", jax.__version__)"
touch .venv/ready'

# send COMMAND: copies the working tree to every worker, then runs a line of shell there.
send() {
    local archive
    archive="${TMPDIR:-/tmp}/jaxblock-$name.tar.gz"
    # Packs the files that git tracks or would add, in their present state: uncommitted changes are sent, but the environment
    # and runs, which git ignores, are not.
    # shellcheck disable=SC2016  # $1 and $2 are those of the inner shell
    local pack='cd "$1" && git ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d "" file; do if [ -e "$file" ]; then printf "%s\0" "$file"; fi; done |
        tar --null --files-from=- -czf "$2"'
    execute bash -o pipefail -c "$pack" pack "$root" "$archive" ||
        fail "cannot pack $root: setup and sync work from a git checkout"
    tpu scp "$archive" "$name:jaxblock.tar.gz" --worker="$worker"
    on_workers "$1"
    execute rm -f "$archive"
}

setup() {
    send "$remote_sync$remote_setup"
}

sync() {
    send "$remote_sync"
}

# Sends the variables of --env in a file. On a command line every user of both machines could read them, and --dry-run would
# print them. The function runs in a subshell, so that its trap deletes the file however it ends.
hand_over() (
    file=VARIABLES
    if [ "$dry_run" = yes ]; then
        printf '# VARIABLES: a file that sets %s\n' "${variables[*]}"
    else
        file="$(mktemp)" # only its owner can read it, and scp keeps that for the copy on the worker
        trap 'rm -f "$file"' EXIT
        for variable in "${variables[@]}"; do
            printf 'export %s=%s\n' "$variable" "$(quote "${!variable}")"
        done >"$file"
    fi
    tpu scp "$file" "$name:jaxblock.env" --worker="$worker"
)

run() {
    [ $# -gt 0 ] || fail "$verb needs a command: launch/tpu.sh $verb ... -- jaxblock train --config FILE"
    local log read_variables=:
    if [ ${#variables[@]} -gt 0 ]; then
        hand_over || exit 2
        # shellcheck disable=SC2016  # expanded on the worker
        read_variables='. "$HOME/jaxblock.env" && rm "$HOME/jaxblock.env" || exit 1'
    fi
    log="logs/$(date -u +%Y%m%d-%H%M%S).log"
    # Only one process can use a TPU: a second one would fail minutes later, with a message about a lock file. The started
    # command inherits descriptor 9, so the lock is held exactly as long as the command runs.
    on_workers "$read_variables
cd \"\$HOME/jaxblock\" || exit 1
exec 9>>logs/lock
if ! flock -n 9; then
echo \"a run is still going here (process \$(cat logs/pid)): wait for it or stop it first\" >&2; exit 1
fi
export PATH=\"\$PWD/.venv/bin:\$PATH\" JAXBLOCK_DISTRIBUTED=1
rm -f logs/pid logs/exit
nohup sh -c '\"\$@\" & echo \$! >logs/pid; wait \$!; echo \$? >logs/exit' run $(quote_all "$@") >$log 2>&1 </dev/null &
until [ -s logs/pid ]; do sleep 0.1; done
ln -sf ${log#logs/} logs/latest.log
echo \"started process \$(cat logs/pid), log: ~/jaxblock/$log\""
}

# Prints one line per worker: "running PROCESS", "ended CODE", "lost" (the process is gone and left no exit code, as after a
# restart of the machine), "none" (nothing was started), or "not set up" (a new slice, or one whose setup failed).
# shellcheck disable=SC2016  # expanded on the worker
remote_status='if [ ! -e "$HOME/jaxblock/.venv/ready" ]; then echo "run: not set up"; exit 0; fi
cd "$HOME/jaxblock" || exit 1
if [ -s logs/exit ]; then echo "run: ended $(cat logs/exit)"
elif [ ! -s logs/pid ]; then echo "run: none"
elif kill -0 "$(cat logs/pid)" 2>/dev/null; then echo "run: running $(cat logs/pid)"
else echo "run: lost"; fi'

slice_state() {
    if [ "$queued" = yes ]; then
        try_gcloud queued-resources describe "$name" --format='value(state.state)'
    else
        try_gcloud tpu-vm describe "$name" --format='value(state)'
    fi
}

status() {
    local state
    state="$(slice_state)" || fail "there is no slice $name in $zone, or it cannot be seen (above: why)"
    printf '%s\n' "$state"
    # The workers can be reached only in these two states. (In a dry run the output is a command, not a state.)
    case "$state" in [A-Z]*) case "$state" in READY | ACTIVE) ;; *) return ;; esac ;; esac
    on_workers "$remote_status; tail -n 1 \"\$HOME/jaxblock/logs/latest.log\" 2>/dev/null || true"
}

# shellcheck disable=SC2016
remote_stop='cd "$HOME/jaxblock" && if [ -s logs/pid ] && [ ! -s logs/exit ]; then kill -TERM "$(cat logs/pid)"; fi'

stop() {
    local found
    # One process that is told to stop stops the whole group; telling the others as well does no harm.
    on_workers "$remote_stop"
    while :; do
        found="$(on_workers "$remote_status")" || exit 2
        printf '%s\n' "$found"
        case "$found" in *running*) ;; *) break ;; esac
        if [ "$dry_run" = yes ]; then break; fi
        sleep "$poll"
    done
}

logs() {
    local follow=''
    if [ "$follow" = yes ]; then follow=' -F'; fi
    on_workers "tail -n $lines$follow \"\$HOME/jaxblock/logs/latest.log\""
}

delete_now() {
    if [ "$queued" = yes ]; then
        try_gcloud queued-resources delete "$name" --force --quiet
    else
        try_gcloud tpu-vm delete "$name" --quiet
    fi
}

delete() {
    local answer=''
    if [ "$yes" = no ] && [ "$dry_run" = no ]; then
        printf 'delete the TPU slice %s in %s with everything on its disks? Type its name: ' "$name" "$zone" >&2
        read -r answer || true
        [ "$answer" = "$name" ] || fail "not deleted"
    fi
    delete_now || fail "gcloud could not delete $name (above: why)"
}

name="${JAXBLOCK_TPU_NAME:-}"
zone="${JAXBLOCK_TPU_ZONE:-}"
project="${JAXBLOCK_TPU_PROJECT:-}"
type="${JAXBLOCK_TPU_TYPE:-}"
version="${JAXBLOCK_TPU_VERSION:-}"
worker='' lines=50 spot=no follow=no yes=no
variables=() queued=no recreate=no retries=20 backoff=30 poll=60

# shellcheck disable=SC2317,SC2329  # called by read_options
take_env() {
    case "$1" in [0-9]* | *[!A-Za-z0-9_]* | '') fail "--env must be the name of a variable, not '$1'" ;; esac
    [ -n "${!1+set}" ] || fail "--env $1: $1 is not set here; export $1 first"
    variables+=("$1")
}

read_verb 'create setup sync run logs status resume stop delete' "$@"
read_options '--name --zone --project --type --version --env --worker --lines --retries --backoff --poll' \
    '--spot --queued --recreate --follow --yes --dry-run' "${@:2}"
case "$verb" in run | resume) ;; *) check_no_command "$verb" ;; esac
[ -n "$name" ] || fail "which slice? --name NAME, or JAXBLOCK_TPU_NAME"
[ -n "$zone" ] || fail "in which zone? --zone ZONE, or JAXBLOCK_TPU_ZONE"
check_whole_numbers lines retries backoff poll
if [ "$recreate" = yes ] && [ -z "$type" ]; then fail "--recreate needs --type"; fi
if [ -z "$worker" ]; then
    if [ "$verb" = logs ]; then worker=0; else worker=all; fi
fi
if [ "$dry_run" = no ] && ! command -v gcloud >/dev/null; then
    fail "gcloud is not on PATH: install the Google Cloud CLI, or see the commands with --dry-run"
fi
"$verb" ${command[@]+"${command[@]}"}

#!/usr/bin/env bash
# A TPU VM slice: create it, set it up, run a command on all its workers, read the logs, delete it.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
    cat <<'HELP'
usage: launch/tpu.sh VERB --name NAME --zone ZONE [OPTIONS] [-- COMMAND...]

  create   make the slice (needs --type)
  setup    copy this working tree to every worker and make a Python environment there; again after every change
  run      start COMMAND on every worker, detached: it outlives the connection. Its output goes to a log there
  logs     show the end of the latest log
  delete   delete the slice and its disks, after asking

  --name NAME        the slice                                  (or JAXBLOCK_TPU_NAME)
  --zone ZONE        for example us-east5-a                     (or JAXBLOCK_TPU_ZONE)
  --project PROJECT  default: gcloud's own                      (or JAXBLOCK_TPU_PROJECT)
  --type TYPE        create: accelerator type, as v6e-8, v5litepod-16 (v5e-16 will do), v5p-8  (or JAXBLOCK_TPU_TYPE)
  --version VERSION  create: VM image; default: the one for the type     (or JAXBLOCK_TPU_VERSION)
  --spot             create: cheaper, and may be taken away at any time
  --worker WORKER    setup, run: which workers (default: all); logs: whose (default: 0)
  --lines N          logs: how many lines (default: 50)
  --follow           logs: go on as the log grows
  --yes              delete: do not ask
  --dry-run          print every command, arguments quoted, and run nothing

example:
  launch/tpu.sh create --name pod --zone us-east5-a --type v6e-8
  launch/tpu.sh setup  --name pod --zone us-east5-a
  launch/tpu.sh run    --name pod --zone us-east5-a -- jaxblock train --config configs/gsm8k_small.yaml
HELP
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# One argument, quoted for any POSIX shell: unlike printf %q it does not depend on the remote shell being bash.
quote() {
    # In variables, since old and new bash read quotes inside a substitution differently.
    local mark="'" escaped="'\\''"
    case "$1" in
        '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s'" "${1//$mark/$escaped}" ;;
        *) printf '%s' "$1" ;;
    esac
}

quote_all() {
    local separator='' argument
    for argument in "$@"; do
        printf '%s' "$separator"
        quote "$argument"
        separator=' '
    done
}

# Runs a command, or with --dry-run prints it as it could be pasted.
execute() {
    if [ "$dry_run" = yes ]; then
        quote_all "$@"
        printf '\n'
    else
        "$@"
    fi
}

tpu() {
    local verb="$1"
    shift
    execute gcloud compute tpus tpu-vm "$verb" "$@" --zone="$zone" ${project:+--project="$project"} ||
        fail "gcloud compute tpus tpu-vm $verb failed (above: why). --dry-run shows the command"
}

# on_workers COMMAND: a line of shell, run by each worker's login shell.
on_workers() {
    tpu ssh "$name" --worker="$worker" --command="$1"
}

create() {
    [ -n "$type" ] || fail "create needs --type, for example --type v6e-8"
    # The product is called v5e, its accelerator type v5litepod.
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
    tpu create "$name" --accelerator-type="$type" --version="$version" ${options[@]+"${options[@]}"}
}

# The images ship Python 3.10 or older, and we need 3.11. uv brings a Python of its own: no package source to add and no
# apt lock to wait for (a fresh image upgrades itself for minutes); it comes from PyPI as one binary, so no script is
# fetched from the web and piped into a shell. PIP_BREAK_SYSTEM_PACKAGES is for images whose Python is marked as managed.
# The tree is unpacked over the old one, which keeps runs, logs and the environment.
# shellcheck disable=SC2016  # $HOME is the worker's
remote_setup='set -eu
cd "$HOME"
mkdir -p jaxblock/logs
tar -xzf jaxblock.tar.gz -C jaxblock
cd jaxblock
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet --upgrade uv
uv="$HOME/.local/bin/uv"
if [ ! -x .venv/bin/python ]; then "$uv" venv --quiet --python 3.12 .venv; fi
"$uv" pip install --quiet --python .venv/bin/python --constraint constraints-py312.txt --editable . "jax[tpu]"
.venv/bin/python -c "import jax, jaxblock; print(\"worker ready: jax\", jax.__version__)"'

setup() {
    local archive
    archive="${TMPDIR:-/tmp}/jaxblock-$name.tar.gz"
    # The files that git knows or would add, as they are now: no environment, no runs, and uncommitted changes too.
    # shellcheck disable=SC2016  # $1 and $2 are the inner shell's
    local pack='cd "$1" && git ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d "" file; do if [ -e "$file" ]; then printf "%s\0" "$file"; fi; done |
        tar --null --files-from=- -czf "$2"'
    execute bash -o pipefail -c "$pack" pack "$root" "$archive" || fail "cannot pack $root: setup works from a git checkout"
    tpu scp "$archive" "$name:jaxblock.tar.gz" --worker="$worker"
    on_workers "$remote_setup"
    execute rm -f "$archive"
}

run() {
    [ $# -gt 0 ] || fail "run needs a command: launch/tpu.sh run ... -- jaxblock train --config FILE"
    local log
    log="logs/$(date -u +%Y%m%d-%H%M%S).log"
    # A TPU has one owner: a second process would fail minutes later, with a message about a lock file. The started
    # command inherits descriptor 9, so the lock lasts exactly as long as it does.
    on_workers "cd \"\$HOME/jaxblock\" || exit 1
exec 9>>logs/lock
if ! flock -n 9; then
echo \"a run is still going here (process \$(cat logs/pid)): wait for it or stop it first\" >&2; exit 1
fi
export PATH=\"\$PWD/.venv/bin:\$PATH\" JAXBLOCK_DISTRIBUTED=1
nohup $(quote_all "$@") >$log 2>&1 </dev/null &
echo \$! >logs/pid
ln -sf ${log#logs/} logs/latest.log
echo \"started process \$!, log: ~/jaxblock/$log\""
}

logs() {
    local follow=''
    if [ "$follow_log" = yes ]; then follow=' -F'; fi
    on_workers "tail -n $lines$follow \"\$HOME/jaxblock/logs/latest.log\""
}

delete() {
    local answer=''
    if [ "$yes" = no ] && [ "$dry_run" = no ]; then
        printf 'delete the TPU slice %s in %s with everything on its disks? Type its name: ' "$name" "$zone" >&2
        read -r answer || true
        [ "$answer" = "$name" ] || fail "not deleted"
    fi
    tpu delete "$name" --quiet
}

name="${JAXBLOCK_TPU_NAME:-}"
zone="${JAXBLOCK_TPU_ZONE:-}"
project="${JAXBLOCK_TPU_PROJECT:-}"
type="${JAXBLOCK_TPU_TYPE:-}"
version="${JAXBLOCK_TPU_VERSION:-}"
worker='' lines=50 spot=no follow_log=no yes=no dry_run=no

verb="${1:-}"
case "$verb" in
    create | setup | run | logs | delete) shift ;;
    -h | --help)
        usage
        exit 0
        ;;
    '')
        usage >&2
        exit 2
        ;;
    *) fail "unknown verb '$verb': one of create, setup, run, logs, delete (--help explains them)" ;;
esac
while [ $# -gt 0 ]; do
    option="$1"
    case "$option" in
        --name | --zone | --project | --type | --version | --worker | --lines)
            [ $# -ge 2 ] || fail "$option needs a value"
            printf -v "${option#--}" '%s' "$2"
            shift
            ;;
        --spot) spot=yes ;;
        --follow) follow_log=yes ;;
        --yes) yes=yes ;;
        --dry-run) dry_run=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            break
            ;;
        *) fail "unknown argument '$option'; a command for the workers comes after --" ;;
    esac
    shift
done
if [ "$verb" != run ] && [ $# -gt 0 ]; then fail "$verb takes no command"; fi
[ -n "$name" ] || fail "which slice? --name NAME, or JAXBLOCK_TPU_NAME"
[ -n "$zone" ] || fail "in which zone? --zone ZONE, or JAXBLOCK_TPU_ZONE"
case "$lines" in '' | *[!0-9]*) fail "--lines must be a number, not '$lines'" ;; esac
if [ -z "$worker" ]; then
    if [ "$verb" = logs ]; then worker=0; else worker=all; fi
fi
if [ "$dry_run" = no ] && ! command -v gcloud >/dev/null; then
    fail "gcloud is not on PATH: install the Google Cloud CLI, or see the commands with --dry-run"
fi
"$verb" "$@"

#!/usr/bin/env bash
# Runs a command on the GPUs of this machine: on one of them to debug, or on all of them, in one process or several.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'HELP'
usage: launch/gpu.sh VERB [OPTIONS] [-- COMMAND...]

  setup    make .venv with JAX for CUDA (jax[cuda13]; --cuda 12 for older drivers)
  check    print what JAX sees
  debug    run COMMAND on one GPU: no memory is preallocated, and errors show where they arise (slow)
  run      run COMMAND on all GPUs. One process sees them all, which is all that one machine needs; with --processes N
           each of N processes has its share of them, as on several machines

  --gpu N          debug: which GPU (default: 0)
  --gpus LIST      run: which GPUs, for example 0,1,4,5 (default: CUDA_VISIBLE_DEVICES, or all)
  --processes N    run: how many processes (default: 1)
  --cuda 12|13     setup: which CUDA (default: 13)
  --dry-run        print the commands and their variables, and run nothing

debug and run let JAX take nine tenths of each card, which is what `jaxblock plan` counts on (JAX's own default is three
quarters), unless XLA_CLIENT_MEM_FRACTION or its older name XLA_PYTHON_CLIENT_MEM_FRACTION is set.

example:
  launch/gpu.sh debug -- jaxblock train --config quickstart_blockwise --train.debug
  launch/gpu.sh run --gpus 0,1 -- jaxblock train --config FILE --train.fsdp 2
HELP
}

gpu=0 gpus="${CUDA_VISIBLE_DEVICES:-}" processes=1 cuda=13
read_verb 'setup check debug run' "$@"
read_options '--gpu --gpus --processes --cuda' '--dry-run' "${@:2}"
check_whole_numbers gpu processes
[ "$processes" -gt 0 ] || fail "--processes must be above 0"
case "$gpus" in *[!0-9,]*) fail "--gpus must be numbers with commas between them, not '$gpus'" ;; esac
case "$cuda" in 12 | 13) ;; *) fail "--cuda must be 12 or 13, not '$cuda'" ;; esac
case "$verb" in
    debug | run) [ ${#command[@]} -gt 0 ] || fail "$verb needs a command, after --" ;;
    *) check_no_command "$verb" ;;
esac

# start NAME=VALUE... COMMAND...: runs the command with these variables set. Programs in .venv are found first.
start() {
    local memory=()
    # JAX refuses to start when both of the variable's names are set.
    if [ -z "${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then memory=(XLA_CLIENT_MEM_FRACTION=0.9); fi
    set -- env ${memory[@]+"${memory[@]}"} "$@"
    export PATH="$venv/bin:$PATH"
    if [ "$dry_run" = no ]; then exec "$@"; fi
    execute "$@"
}

setup() {
    install_environment gcs
    execute "$venv_python" -m pip install --quiet --disable-pip-version-check "jax[cuda$cuda]" ||
        fail "pip could not install jax[cuda$cuda] (above: why)"
    check
}

check() {
    [ -x "$venv_python" ] || [ "$dry_run" = yes ] || fail "there is no .venv here yet: launch/gpu.sh setup makes it"
    execute "$venv_python" -c 'import jax; devices = jax.devices(); '\
'print(*(f"{d.id} {d.platform} {d.device_kind}" for d in devices), sep="\n"); raise SystemExit(devices[0].platform != "gpu")' ||
        fail "JAX sees no GPU: nvidia-smi shows the driver; launch/gpu.sh setup installs JAX for it"
}

debug() {
    start JAXBLOCK_DISTRIBUTED=0 CUDA_VISIBLE_DEVICES="$gpu" XLA_PYTHON_CLIENT_PREALLOCATE=false \
        CUDA_LAUNCH_BLOCKING=1 JAX_TRACEBACK_FILTERING=off "$@"
}

count_gpus() {
    local listed
    if [ -n "$gpus" ]; then
        listed="${gpus//[!,]/}"
        printf '%s\n' "$((${#listed} + 1))"
    else
        command -v nvidia-smi >/dev/null || fail "nvidia-smi is not on PATH, so the GPUs cannot be counted: --gpus 0,1,..."
        nvidia-smi --list-gpus | wc -l
    fi
}

run() {
    if [ "$processes" -eq 1 ]; then
        start JAXBLOCK_DISTRIBUTED=0 ${gpus:+CUDA_VISIBLE_DEVICES="$gpus"} "$@"
        return
    fi
    local total
    total="$(count_gpus)"
    [ $((total % processes)) -eq 0 ] || fail "$total GPUs do not divide among $processes processes"
    if [ -z "$gpus" ]; then gpus="$(seq -s , 0 $((total - 1)))"; fi
    # Each process picks its share of the list by its number in the group.
    # shellcheck disable=SC2016  # the variables are those of the inner shell
    start JAXBLOCK_GPUS="$gpus" JAXBLOCK_SHARE="$((total / processes))" \
        "$root/launch/local_pod.sh" "$processes" --platform cuda -- bash -c 'first=$((JAX_PROCESS_ID * JAXBLOCK_SHARE + 1))
CUDA_VISIBLE_DEVICES="$(printf %s "$JAXBLOCK_GPUS" | cut -d , -f "$first-$((first + JAXBLOCK_SHARE - 1))")"
export CUDA_VISIBLE_DEVICES
exec "$@"' share "$@"
}

"$verb" ${command[@]+"${command[@]}"}

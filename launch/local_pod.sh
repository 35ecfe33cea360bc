#!/usr/bin/env bash
# Runs a command in several processes on this machine, joined like the hosts of a pod: for tests, and to try a command before
# machines are rented.
set -euo pipefail
# shellcheck source=launch/command_line.sh
source "$(dirname "${BASH_SOURCE[0]}")/command_line.sh"

usage() {
    cat <<'HELP'
usage: launch/local_pod.sh N [OPTIONS] -- COMMAND...

Starts COMMAND N times as one process group over loopback, each process with host (CPU) devices of its own. Lines of
output begin with the process's number. When one fails, the others are ended (SIGTERM, then SIGKILL), and its exit code
is returned. SIGINT and SIGTERM are passed on to all.

  --devices M   devices of each process (default: 1)
  --platform P  JAX_PLATFORMS (default: cpu); launch/gpu.sh asks for cuda
  --port PORT   port of the coordinator (default: one that is free)
  --grace S     seconds between SIGTERM and SIGKILL (default: 10)

Exit codes 130 and 143 mean "told to stop and saved": the others, which are stopping too, are given 10 times the grace.

example:
  launch/local_pod.sh 2 --devices 4 -- jaxblock train --config quickstart_blockwise
HELP
}

help_if_asked "$@"
if ! is_whole_number "$1" || [ "$1" -eq 0 ]; then fail "how many processes? '$1' is not a number above 0 (--help)"; fi
count="$1" devices=1 port=0 grace=10 platform=cpu
read_options '--devices --platform --port --grace' '' "${@:2}"
check_whole_numbers devices port grace
[ ${#command[@]} -gt 0 ] || fail "a command is needed, after -- (--help)"

in_use() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
while [ "$port" -eq 0 ]; do
    port=$((20000 + RANDOM % 12000)) # below the range of ports that the system gives to programs by itself
    if in_use "$port"; then port=0; fi
done

scratch="$(mktemp -d)"
mkfifo "$scratch/ended"
exec 4<>"$scratch/ended" # opened for both, since opening one end alone waits until somebody opens the other
rm -r "$scratch"

export JAX_PLATFORMS="$platform" JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$count"
if [ "$platform" = cpu ]; then
    export JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
fi

prefixed() {
    local line
    while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

# member INDEX COMMAND...: runs the command as process INDEX of the group, and reports its process id and then its exit code
# through descriptor 4. It ignores signals, since a terminal sends Ctrl-C to it too and the script waits for its report.
member() {
    local index="$1" code=0
    shift
    trap '' INT TERM
    (
        trap - INT TERM
        export JAX_PROCESS_ID="$index"
        exec "$@" 4>&-
    ) > >(trap '' INT TERM; prefixed "$index") 2> >(trap '' INT TERM; prefixed "$index" >&2) &
    printf 'pid %s %s\n' "$index" "$!" >&4
    wait "$!" || code=$?
    printf 'end %s %s\n' "$index" "$code" >&4
}

pids=()
signal_all() {
    local pid
    for pid in ${pids[@]+"${pids[@]}"}; do
        if [ -n "$pid" ]; then kill -s "$1" "$pid" 2>/dev/null || true; fi
    done
}

asked=no
# shellcheck disable=SC2317,SC2329  # called by the traps
pass_on() {
    asked=yes
    signal_all "$1"
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM

for ((index = 0; index < count; index++)); do
    member "$index" "${command[@]}" &
done

left=$count code=0 deadline=0
while [ "$left" -gt 0 ]; do
    if ! read -r -t 1 what index value <&4; then
        if [ "$deadline" -gt 0 ] && [ "$SECONDS" -ge "$deadline" ]; then
            signal_all KILL
            deadline=0
        fi
        continue
    fi
    if [ "$what" = pid ]; then
        pids[index]="$value"
        printf 'process %s is %s\n' "$index" "$value" >&2
        if [ "$asked" = yes ]; then kill -s TERM "$value" 2>/dev/null || true; fi
        continue
    fi
    left=$((left - 1))
    pids[index]=''
    if [ "$value" -eq 0 ]; then continue; fi
    if [ "$code" -ne 0 ] || [ "$asked" = yes ] || [ "$left" -eq 0 ]; then
        printf 'process %s ended with exit code %s\n' "$index" "$value" >&2
    elif [ "$value" -eq 130 ] || [ "$value" -eq 143 ]; then
        printf 'process %s was told to stop and has stopped: waiting for the others\n' "$index" >&2
        deadline=$((SECONDS + 10 * grace))
    else
        printf 'process %s ended with exit code %s: ending the others\n' "$index" "$value" >&2
        signal_all TERM
        deadline=$((SECONDS + grace))
    fi
    if [ "$code" -eq 0 ]; then code="$value"; fi
done
wait || true
exit "$code"

# shellcheck shell=bash
# Sourced by tpu.sh: the verb "resume", which restarts a run after preemptions and other failures that another try may mend,
# and ends with advice at those that it cannot.
# shellcheck disable=SC2154  # tpu.sh sets the options and remote_status

# verdict LINES: prints what to do about the run, given the status line of every worker: running (wait), setup (set the workers
# up, then start it), again (start it again), done, or failed CODE.
verdict() {
    local found="$1" code
    case "$found" in *'run: running'*) echo running && return ;; *'run: not set up'*) echo setup && return ;; esac
    for code in $(printf '%s\n' "$found" | sed -n 's/.*run: ended \([0-9]*\).*/\1/p'); do
        # 130 and 143: it was told to stop, and saved. 124: it hung, and its watchdog ended it. 137: it was killed, for example
        # by maintenance of the host. 134: another process of the group was lost. In each case the last checkpoint is whole.
        case "$code" in 0 | 124 | 130 | 134 | 137 | 143) ;; *) echo "failed $code" && return ;; esac
    done
    case "$found" in
        *'run: lost'* | *'run: none'* | *'ended 1'[2-4][0-9]*) echo again ;;
        *'run: ended 0'*) echo 'done' ;;
        *) echo again ;;
    esac
}

# remedy MESSAGE: for an error message of gcloud that would come again at every try, prints what to do about it. Fails for any
# other message.
remedy() {
    case "$1" in
        *UNAUTHENTICATED* | *'gcloud auth login'*) echo "Log in (gcloud auth login), then start resume again." ;;
        *SERVICE_DISABLED* | *'it is disabled'*) echo "Enable the API: gcloud services enable tpu.googleapis.com" ;;
        *PERMISSION_DENIED*)
            echo "If --zone $zone and --project ${project:-(the one that gcloud is set to)} are right, this account" \
                "(gcloud auth list) needs the role roles/tpu.admin in the project."
            ;;
        *'required property [project]'*) echo "Name the project: --project PROJECT" ;;
        *INVALID_ARGUMENT* | *'unrecognized arguments'* | *'Invalid choice'*)
            echo "Correct --name, --zone, --project, --type or --version; --dry-run shows the command."
            ;;
        *NOT_FOUND*"nodes/$name"* | *NOT_FOUND*"queuedResources/$name"*) return 1 ;;
        *NOT_FOUND*[Pp]roject* | *NOT_FOUND*[Ll]ocation* | *NOT_FOUND*[Zz]one*)
            echo "Correct --zone $zone or --project ${project:-(the one that gcloud is set to)}: there is no such one."
            ;;
        *) return 1 ;;
    esac
}

# Prints the last lines that a command wrote to stderr: ssh prints the cause a few lines before gcloud's own last line.
last_error() {
    grep -v '^[[:space:]]*$' "$errors" | tail -n 6 || true
}

# Ends the script with advice if the last error is one that trying again cannot mend.
end_if_hopeless() {
    local advice
    if advice="$(remedy "$(cat "$errors")")"; then
        fail "gcloud refuses, and would again:
$(last_error)
$advice"
    fi
}

# attempt COMMAND...: runs a step that may be tried again when it fails, and shows its errors as they come.
attempt() {
    { ("$@") 2>&1 >&3 3>&- | tee "$errors" >&2; } 3>&1 && return
    end_if_hopeless
    return 1
}

recreate() {
    [ "$recreate" = yes ] || fail "the slice $name is gone or was preempted; resume --recreate --type TYPE deletes what \
is left of it and creates it again"
    if [ "$state" != absent ]; then attempt delete_now || return 1; fi
    # A queued slice is there only after a while: the check that finds it also finds that it must be set up.
    attempt create && [ "$queued" = no ] && attempt setup
}

# Asks for the state of the slice and of the run. Sets `state` (the slice's) and `what` (what to do about it). Waiting for
# capacity is no failure; not being able to ask (`unseen`) is.
look() {
    local found
    what="wait"
    if ! state="$(slice_state 2>"$errors")"; then
        end_if_hopeless
        # Of all failures only "not found" means that the slice is gone.
        case "$(cat "$errors")" in *NOT_FOUND* | *'was not found'*) state=absent ;; *) what=unseen && return ;; esac
    fi
    case "$state" in
        READY | ACTIVE)
            if found="$(try_gcloud tpu-vm ssh "$name" --worker="$worker" --command="$remote_status" 2>"$errors")"; then
                what="$(verdict "$found")"
            else
                end_if_hopeless
                what=unseen
            fi
            ;;
        PREEMPTED | TERMINATED | SUSPENDED | FAILED | absent) what=recreate ;;
        '')
            echo "gcloud named no state of $name" >>"$errors"
            what=unseen
            ;;
    esac
}

# backoff_of N: prints how many seconds to wait before the N-th try in a row: --backoff, doubled each time, 900 at most.
backoff_of() {
    local seconds="$backoff" i
    for ((i = 1; i < $1 && seconds < 900; i++)); do seconds=$((seconds * 2)); done
    echo "$((seconds > 900 ? 900 : seconds))"
}

# rehearse COMMAND...: prints, for --dry-run, all commands that resume may run, in order.
rehearse() {
    printf '# every %s s: the slice, and what the run is doing on each worker\n' "$poll"
    slice_state
    on_workers "$remote_status"
    if [ "$recreate" = yes ]; then
        printf '# where the slice was preempted or is gone:\n'
        delete_now
        create
        setup
    fi
    printf '# where the run was never started, or ended in a way that another start may mend:\n'
    run "$@"
}

# start_again COMMAND...: starts the run, after a wait unless this is the first start. What fails here shows at the next check.
start_again() {
    local pause
    if [ "$starts" -gt 0 ]; then
        if [ "$starts" -gt "$retries" ]; then fail "given up after $retries restarts"; fi
        in_a_row=$((in_a_row + 1))
        pause="$(backoff_of "$in_a_row")"
        printf 'restart %s of at most %s in %s s (the slice is %s)\n' "$starts" "$retries" "$pause" "$state" >&2
        sleep "$pause"
    fi
    starts=$((starts + 1))
    if [ "$what" = recreate ]; then recreate || return 0; fi
    if [ "$what" = setup ]; then attempt setup || return 0; fi
    attempt run "$@" || true
}

# Waits before the next check after one that failed, or ends the script after too many of them in a row.
look_again() {
    local pause
    unseen=$((unseen + 1))
    if [ "$unseen" -gt "$retries" ]; then
        fail "given up: $name could not be looked at $unseen times in a row. A run that is going goes on. The last error:
$(last_error)"
    fi
    pause="$(backoff_of "$unseen")"
    printf 'cannot look at %s:\n%s\nretry %s of at most %s in %s s\n' "$name" "$(last_error)" "$unseen" "$retries" "$pause" >&2
    sleep "$pause"
}

resume() {
    [ $# -gt 0 ] || fail "resume needs a command: launch/tpu.sh resume ... -- jaxblock train --config FILE"
    if [ "$dry_run" = yes ]; then
        rehearse "$@"
        return
    fi
    local state what starts=0 in_a_row=0 unseen=0
    errors="$(mktemp)"
    trap 'rm -f "$errors"' EXIT
    while :; do
        look
        if [ "$what" != unseen ]; then unseen=0; fi
        case "$what" in
            unseen) look_again ;;
            running)
                in_a_row=0
                sleep "$poll"
                ;;
            wait)
                printf 'the slice is %s: looking again in %s s\n' "$state" "$poll" >&2
                sleep "$poll"
                ;;
            done) return ;;
            failed*)
                printf 'error: the run ended with exit code %s: see launch/tpu.sh logs\n' "${what#failed }" >&2
                exit "${what#failed }"
                ;;
            *) start_again "$@" ;;
        esac
    done
}

# shellcheck shell=bash
# Sourced by the launch scripts: reads options, reports mistakes, quotes arguments, and runs commands or (--dry-run) prints
# them. A script that sources this file defines `usage`, which prints its help text.
# Works with bash 3.2 too, which macOS ships: it cannot expand an empty array under `set -u`, hence ${array[@]+"${array[@]}"}.

# shellcheck disable=SC2034  # used by the scripts that source this file
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
dry_run=no
takes_command=yes # a script that takes no command after -- sets this to no

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Prints a message for the user. In a dry run it is a shell comment, so that the output can still be pasted into a shell.
say() {
    local mark=''
    if [ "$dry_run" = yes ]; then mark='# '; fi
    printf "$mark%s\n" "$@"
}

# quote ARGUMENT: quotes it for any POSIX shell. (What printf %q prints only bash can read, and a worker may run another shell.)
quote() {
    # The two are variables because versions of bash differ in how they read quotes inside a substitution.
    local mark="'" escaped="'\\''"
    case "$1" in
        '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s'" "${1//$mark/$escaped}" ;;
        *) printf '%s' "$1" ;;
    esac
}

# quote_all ARGUMENT...: the same for several arguments, separated by spaces.
quote_all() {
    local separator='' argument
    for argument in "$@"; do
        printf '%s' "$separator"
        quote "$argument"
        separator=' '
    done
}

# execute COMMAND...: runs the command. In a dry run it prints the command instead, quoted, ready to be pasted.
execute() {
    if [ "$dry_run" = no ]; then
        "$@"
    else
        quote_all "$@"
        printf '\n'
    fi
}

# help_if_asked ARGUMENTS...: for --help prints the help text and ends; without arguments that is a mistake (exit code 2).
help_if_asked() {
    case "${1:-}" in
        -h | --help) usage && exit 0 ;;
        '') usage >&2 && exit 2 ;;
    esac
}

# contains WORDS WORD: whether a string of words separated by spaces contains the word.
contains() {
    case "$2" in '' | *' '*) return 1 ;; esac
    case " $1 " in *" $2 "*) ;; *) return 1 ;; esac
}

# read_verb VERBS ARGUMENTS...: sets `verb` to the first argument, which must be one of VERBS (a string of words).
read_verb() {
    local verbs="$1"
    shift
    help_if_asked "$@"
    verb="$1"
    contains "$verbs" "$verb" || fail "unknown verb '$verb': one of ${verbs// /, } (--help explains them)"
}

# read_options OPTIONS SWITCHES ARGUMENTS...: sets the variable that each option is named after: `--type v6e-8` and
# `--type=v6e-8` set type=v6e-8, and the switch `--dry-run` sets dry_run=yes. Where an option NAME needs more than that, the
# script defines a function take_NAME, which is called with the value. What follows `--` becomes the array `command`.
# OPTIONS, which take a value, and SWITCHES, which do not, are strings of words such as '--name --zone'.
read_options() {
    local options="$1" switches="$2" option variable value hint=''
    if [ "$takes_command" = yes ]; then hint='; a command comes after --'; fi
    shift 2
    command=()
    while [ $# -gt 0 ]; do
        option="${1%%=*}"
        variable="${option#--}"
        variable="${variable//-/_}"
        if [ "$1" = -h ] || [ "$1" = --help ]; then
            usage && exit 0
        elif [ "$1" = -- ] && [ "$takes_command" = yes ]; then
            command=("${@:2}")
            return
        elif contains "$switches" "$1"; then
            printf -v "$variable" yes
        elif contains "$options" "$option"; then
            value="${1#*=}"
            if [ "$1" = "$option" ]; then
                [ $# -ge 2 ] || fail "$option needs a value"
                value="$2"
                shift
            fi
            if [ "$(type -t "take_$variable")" = function ]; then
                "take_$variable" "$value"
            else
                printf -v "$variable" '%s' "$value"
            fi
        else
            fail "unknown argument '$1' (--help shows the options)$hint"
        fi
        shift
    done
}

# check_no_command VERB: fails where a command was given to a verb that takes none.
check_no_command() {
    [ ${#command[@]} -eq 0 ] || fail "$1 takes no command"
}

# is_whole_number TEXT: whether a text is a whole number from 0 to 999999999. Leading zeros are refused: bash reads 010 as 8.
is_whole_number() {
    case "$1" in
        0) ;;
        '' | *[!0-9]* | 0* | ??????????*) return 1 ;;
    esac
}

# check_whole_numbers NAME...: fails unless the options of these names have whole numbers as their values.
check_whole_numbers() {
    local name
    for name in "$@"; do
        is_whole_number "${!name}" || fail "--$name must be a whole number without leading zeros, not '${!name}'"
    done
}

# shellcheck shell=bash
# Sourced by the launch scripts that need Python: finds a Python, makes .venv with it, and installs jaxblock there once.
# Sets venv and venv_python. The variable PYTHON chooses the interpreter that .venv is made with.
# shellcheck source=launch/command_line.sh
source "$(dirname "${BASH_SOURCE[0]}")/command_line.sh"

venv="$root/.venv"
venv_python="$venv/bin/python"

# python_fits PYTHON: whether this interpreter is new enough and can make environments. Only running it shows that: pyenv
# installs commands that just print an error, and Debian's python3 lacks venv unless python3-venv is installed.
python_fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        python_fits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or newer that can make environments (venv, ensurepip)"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11 python python3.13; do
        if python_fits "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with venv found (python3 is: $(python3 --version 2>&1 || true)).
Install one (Debian, Ubuntu: apt install python3.12 python3.12-venv; anywhere: https://www.python.org/downloads/)
or name it: PYTHON=/path/to/python3.12 $0"
}

# fingerprint PYTHON FILES...: a hash of what the environment is made from. When it changes, pip runs again.
fingerprint() {
    "$1" - "$root/requirements.txt" "$root/pyproject.toml" "${@:2}" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(repr((sys.version, sys.prefix)).encode())
for name in sys.argv[1:]:
    digest.update(name.encode() + pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
}

# install_environment [EXTRAS]: installs jaxblock, editable, with the tested versions of its dependencies (a constraints file
# for this version of Python) where there are any.
install_environment() {
    local extras="${1:-}" chosen python="$venv_python" constraints version now stamp
    if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        chosen="$(find_python)"
        say "making .venv with $("$chosen" --version) ($chosen)"
        execute "$chosen" -m venv --clear "$venv"
        # In a dry run .venv is not made, so that this interpreter is the only one whose version can be asked.
        if [ "$dry_run" = yes ]; then python="$chosen"; fi
    fi
    version="$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')"
    constraints="$root/constraints-py$version.txt"
    local pins=()
    if [ -f "$constraints" ]; then pins=("$constraints"); fi
    now="$(fingerprint "$python" ${pins[@]+"${pins[@]}"})"
    # The development extras contain all other dependencies, so after them nothing is left to install.
    for stamp in "$venv/.installed-dev" "$venv/.installed-$extras"; do
        if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ]; then
            say "dependencies: installed already in .venv"
            return
        fi
    done
    say "dependencies: installing into .venv${pins[0]+ with the pins of ${pins[0]##*/}}"
    if [ ${#pins[@]} -eq 0 ]; then
        say "note: there is no tested set of versions for this Python; the newest that satisfy requirements.txt are taken"
    fi
    execute "$venv_python" -m pip install --quiet --disable-pip-version-check ${pins[@]+--constraint "${pins[@]}"} \
        --editable "$root${extras:+[$extras]}" ||
        fail "pip could not install the dependencies (above: why). Is there a network? A mirror goes in PIP_INDEX_URL"
    if [ "$dry_run" = no ]; then printf '%s\n' "$now" >"$venv/.installed-$extras"; fi
}

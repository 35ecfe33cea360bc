#!/usr/bin/env bash
# Builds the source distribution and the wheel, checks them, and tries the wheel in an environment that has nothing else.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'HELP'
usage: launch/release.sh [--out FOLDER] [--dry-run]

Checks that no file is changed and not committed, and that the version is the same in jaxblock/__init__.py, CHANGELOG.md and
CITATION.cff; builds both distributions; checks their metadata (twine) and contents (tests/test_wheel.py); installs the wheel
with the dependencies that it names into an empty environment outside of the repository, and runs `jaxblock quickstart --short`
there. Publishes nothing: the last line says how to.

  --out FOLDER   where the distributions go (default: dist, in the repository); it must be empty or absent
  --dry-run      print the commands, and run nothing

Environment:
  PYTHON         interpreter to make .venv from (3.11 or newer)
HELP
}

takes_command=no out="$root/dist"
read_options --out --dry-run "$@"

if [ "$dry_run" = no ]; then
    [ -z "$(git -C "$root" status --porcelain)" ] ||
        fail "there are files that are not committed (git status): a release is made from a commit"
    [ ! -e "$out" ] || [ -z "$(ls -A "$out")" ] || fail "$out is not empty: remove it, or choose another with --out"
    mkdir -p "$out"
    out="$(cd "$out" && pwd)"
fi
install_environment dev

trial="$(mktemp -d)"
trap 'rm -rf "$trial"' EXIT

# Building leaves folders beside the sources, so it is done in a copy of the commit.
say "" "== build"
execute git clone --quiet "$root" "$trial/source"
execute "$venv_python" -m build --outdir "$out" "$trial/source"

say "" "== check"
if [ "$dry_run" = yes ]; then
    execute "$venv_python" -m twine check --strict "$out"/jaxblock-VERSION.tar.gz "$out"/jaxblock-VERSION-py3-none-any.whl
    wheel="$out/jaxblock-VERSION-py3-none-any.whl"
else
    "$venv_python" -m twine check --strict "$out"/*
    wheel="$(echo "$out"/*.whl)"
fi
execute cd "$root"
execute "$venv_python" -m pytest --quiet -n 0 "$root/tests/test_wheel.py"

say "" "== try"
execute "$venv_python" -m venv "$trial/venv"
execute "$trial/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel"
execute cd "$trial"
execute "$trial/venv/bin/jaxblock" --version
execute "$trial/venv/bin/jaxblock" presets
execute "$trial/venv/bin/jaxblock" quickstart --short --out "$trial/quickstart"

version="${wheel##*/jaxblock-}"
say "" "== done: tag the commit (git tag v${version%%-*}), then publish:" "  $(quote "$venv_python") -m twine upload $(quote "$out")/*"

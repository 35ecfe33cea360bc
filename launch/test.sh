#!/usr/bin/env bash
# Runs the whole fast test suite in an environment that it makes: launch/test.sh [pytest arguments]
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ "${1:-}" = "--help" ] || [ "${1:-}" = "-h" ]; then
    cat <<'HELP'
usage: launch/test.sh [PYTEST ARGUMENTS]

Makes .venv (first call only), installs jaxblock and its development tools at tested versions, and runs every test that
is not marked slow. Arguments go to pytest: launch/test.sh tests/diffusion -k quota

Environment:
  PYTHON                 interpreter to make .venv from (3.11 or newer)
  JAXBLOCK_TEST_WORKERS  parallel test processes (default: 2; 0 for none)
HELP
    exit 0
fi

install_environment dev
cd "$root"
# The tests of a file share compiled functions, so they all run in one process.
exec "$venv_python" -m pytest -m "not slow" -n "${JAXBLOCK_TEST_WORKERS:-2}" --dist loadfile "$@"

"""Runs launch/tpu.sh against a stand-in for gcloud, which records its arguments, and answers or fails as a test asks."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

# Bash alone: a test calls it up to a hundred times, and Python takes twenty times as long to start.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$#" "$@" >>"$GCLOUD_RECORD"
for argument in "$@"; do
    if [ "$argument" = "${GCLOUD_FAILS:-nothing}" ]; then echo "${GCLOUD_ERROR:-ERROR: no capacity}" >&2; exit 7; fi
done
# Prints (and takes off) the first line of a file of answers; a line that begins with "!" goes to stderr, and fails.
answer() {
    local lines line
    lines="$(<"$1")"$'\\n'
    line="${lines%%$'\\n'*}"
    printf '%s' "${lines#*$'\\n'}" >"$1"
    case "$line" in '!'*) echo "${line#!}" >&2; exit 1 ;; *) printf '%b\\n' "$line" ;; esac
}
if [ "$4" = describe ] && [ -n "${GCLOUD_STATES:-}" ]; then answer "$GCLOUD_STATES"; fi
case "$*" in *'run: none'*) if [ -n "${GCLOUD_RUNS:-}" ]; then answer "$GCLOUD_RUNS"; fi ;; esac
if [ "$4" = scp ] && [ -n "${GCLOUD_KEEP:-}" ]; then cp "$5" "$GCLOUD_KEEP"; fi
exit 0
"""


def put(path: Path, text: str) -> Path:
    """Writes a file that can be run, and returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Desk:
    """A machine that has the stand-in for gcloud on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / "record"
        path = f"{put(folder / 'bin' / 'gcloud', GCLOUD).parent}:{os.environ['PATH']}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAXBLOCK_")}
        self.environment = inherited | {"PATH": path, "GCLOUD_RECORD": str(self.record), "TMPDIR": str(folder)}

    def script(self, *arguments: str, typed: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs launch/tpu.sh with the arguments, whether or not they make sense."""
        command, variables = [LAUNCH / "tpu.sh", *arguments], self.environment | variables
        return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60, env=variables)

    def tpu(self, verb: str, *arguments: str, typed: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a verb of launch/tpu.sh for the slice ``pod``."""
        return self.script(verb, "--name", "pod", "--zone", "us-east5-a", *arguments, typed=typed, **variables)

    @property
    def calls(self) -> list[list[str]]:
        """Returns the arguments of every call of gcloud so far, without ``compute tpus``, which each begins with."""
        words = self.record.read_text(encoding="utf-8").split("\0")[:-1] if self.record.exists() else []
        found = []
        while words:
            count, *words = words
            found.append(words[: int(count)])
            words = words[int(count) :]
        assert all(call[:2] == ["compute", "tpus"] for call in found)
        return [call[2:] for call in found]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)

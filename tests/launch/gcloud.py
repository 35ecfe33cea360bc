"""Runs launch/tpu.sh against a stand-in for gcloud, which records its arguments, and answers or fails as a test asks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "tpu.sh"
SLICE = ["--name", "pod", "--zone", "us-east5-a"]
BASE = ["compute", "tpus", "tpu-vm"]

GCLOUD = """#!/usr/bin/env bash
python3 - "$GCLOUD_RECORD" "$@" <<'PY'
import json, sys
with open(sys.argv[1], "a") as record:
    record.write(json.dumps(sys.argv[2:]) + "\\n")
PY
for argument in "$@"; do
    if [ "$argument" = "${GCLOUD_FAILS:-nothing}" ]; then echo "${GCLOUD_ERROR:-ERROR: no capacity}" >&2; exit 7; fi
done
# Prints (and takes off) the first line of a file of answers; a line that begins with "!" goes to stderr, and fails.
answer() {
    local line
    line="$(head -n 1 "$1")"
    sed -i 1d "$1"
    case "$line" in '!'*) echo "${line#!}" >&2; exit 1 ;; *) printf '%b\\n' "$line" ;; esac
}
if [ "$4" = describe ] && [ -n "${GCLOUD_STATES:-}" ]; then answer "$GCLOUD_STATES"; fi
case "$*" in *'run: none'*) if [ -n "${GCLOUD_RUNS:-}" ]; then answer "$GCLOUD_RUNS"; fi ;; esac
if [ "$4" = scp ] && [ -n "${GCLOUD_KEEP:-}" ]; then cp "$5" "$GCLOUD_KEEP"; fi
exit 0
"""


class Desk:
    """A machine that has the stand-in for gcloud on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.record = folder / "record.jsonl"
        binaries = folder / "bin"
        binaries.mkdir()
        (binaries / "gcloud").write_text(GCLOUD)
        (binaries / "gcloud").chmod(0o755)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAXBLOCK_")}
        self.environment = inherited | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "GCLOUD_RECORD": str(self.record),
            "TMPDIR": str(folder),
        }

    def tpu(self, *arguments: str, typed: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, *arguments], input=typed, capture_output=True, text=True, env=self.environment | variables
        )

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []

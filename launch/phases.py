"""Runs the phases of a launch script and records how long each took and how much memory it needed.

phases.py run RECORD NAME COMMAND...    runs a command, appends a JSON line to RECORD, ends with the command's exit code
phases.py report RECORD [LABEL=FILE...] prints the phases, and the scores in each summary.json of `evaluate`

It uses the standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any


def run(record: Path, name: str, command: list[str]) -> int:
    """Runs one phase as a child process and appends its wall time, peak memory and exit code to the record.

    SIGTERM is passed on to the child process.

    Args:
        record: the file that gets one JSON line per finished phase.
        name: the name of the phase in the record.
        command: the program to run, with its arguments.

    Returns:
        The exit code as a shell would give it: 128 + signal number where a signal ended the process.
    """
    start = time.monotonic()
    # A terminal sends Ctrl-C to the child process as well, which saves and ends by itself. This process ignores it, so that it
    # can still record the phase and return its exit code.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    process = subprocess.Popen(command)

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    # The unit is KiB on Linux and bytes on macOS. It is the peak of the largest single process, not a sum over all of them.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    entry = {"phase": name, "seconds": round(time.monotonic() - start, 1), "peak_bytes": peak, "exit": code}
    with open(record, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    return code if code >= 0 else 128 - code


def report(record: Path, scores: list[str]) -> None:
    """Prints a table of all phases in the record, with those of earlier calls, and then the scores.

    Args:
        record: the file that `run` appended to; of a phase that ran several times the longest successful run is shown.
        scores: entries of the form ``label=path/to/summary.json``; entries whose file does not exist are left out.
    """
    best: dict[str, dict[str, float]] = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        # A phase that finds its work already done takes seconds; the run to show is the one that did the work.
        if entry["exit"] == 0 and entry["seconds"] >= best.get(entry["phase"], entry)["seconds"]:
            best[entry["phase"]] = entry
    width = max([len(name) for name in best] + [5])
    print(f"{'phase':<{width}}  {'wall time':>9}  {'peak memory':>11}")
    for name, entry in best.items():
        minutes, seconds = divmod(round(entry["seconds"]), 60)
        print(f"{name:<{width}}  {minutes:>5}m{seconds:02}s  {entry['peak_bytes'] / 2**30:>7.2f} GiB")
    total = sum(entry["seconds"] for entry in best.values())
    print(f"{'all':<{width}}  {int(total) // 60:>5}m{round(total) % 60:02}s")
    print()
    for label, _, name in (score.partition("=") for score in scores):
        if Path(name).exists():
            print(f"{label}  {score_text(json.loads(Path(name).read_text(encoding='utf-8')))}")


def score_text(summary: dict[str, Any]) -> str:
    """Formats one evaluation in a line or two: Pass@1 with its 95% interval, the NELBO, and the paired test if it has one."""
    rate = summary["pass_at_1"]
    share = rate["correct"] / rate["n"]
    text = f"Pass@1 {share:.1%} [{rate['low']:.1%}, {rate['high']:.1%}] ({rate['correct']} of {rate['n']})"
    if bound := summary.get("nelbo_per_token"):
        text += f", NELBO {bound['mean']:.4f} (standard error {bound['se']:.4f}) nats per text token"
    if test := summary.get("compared_with"):
        name = Path(test["file"]).parent.name
        text += f"\n  against {name}: {test['only_b']} problems right here alone, {test['only_a']} right there alone"
        text += f" (McNemar, exact: p = {test['p_value']:.2g})"
    return text


def main(arguments: list[str]) -> int:
    """Runs the command (`run` or `report`) that the arguments name.

    Returns:
        The exit code of the phase, 0 after a report, or 2 if the arguments are wrong.
    """
    match arguments:
        case ["run", record, name, *command] if command:
            return run(Path(record), name, command)
        case ["report", record, *scores]:
            report(Path(record), scores)
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

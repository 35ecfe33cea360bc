"""Measures jaxblock on one host with GPUs or TPUs, unattended: every item in a process of its own, within a time limit.

Results are in OUT/results.json and OUT/results.md after every item. The same command goes on where it stopped: items whose
result is there, a failure among them, are not run again (unless --again).

    python -m benchmarks.accelerator
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accelerator import report
from benchmarks.accelerator.sizes import ITEMS, Item

ROOT = Path(__file__).resolve().parents[2]
CHILD = [sys.executable, "-m", "benchmarks.accelerator.child"]
"""The command that runs one item."""
LEAST = 10.0
"""No item begins with fewer seconds than these left: starting JAX alone may take as long."""
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL to an item that is over its limit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the items; the exit code is 0 if each is done or was skipped for a reason, 1 if not, 130 after Ctrl-C."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    record = report.read(args.out / "results.json")
    if record["items"] and record["tiny"] != args.tiny:
        sys.exit(
            f"{args.out} holds results of other sizes ({'tiny' if record['tiny'] else 'full'}): choose another --out"
        )
    record["tiny"] = args.tiny
    chosen = [item for item in ITEMS if not args.only or item.name in args.only]
    order = [(item.name, item.what) for item in ITEMS]
    total, begin, commit = args.minutes * 60.0, time.monotonic(), args.commit or find_commit()
    for item in chosen:
        before = record["items"].get(item.name)
        if before is not None and before["status"] not in report.TO_REPEAT and not args.again:
            print(f"{item.name}: {before['status']} already", flush=True)
            continue
        left = total - (time.monotonic() - begin) - GRACE
        found = run_item(item, min(item.share * total, left), args)
        found["commit"] = commit
        record["items"][item.name] = found
        report.write(args.out, record, order)
        print(f"{item.name}: {found['status']} {found.get('reason', '')} ({found['seconds']:.0f} s)", flush=True)
        if found["status"] == "interrupted":
            return 130
    print(f"results are in {args.out / 'results.md'}")
    statuses = {record["items"][item.name]["status"] for item in chosen}
    return 0 if statuses <= {"done", "skipped"} else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    names = [item.name for item in ITEMS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="where results go (default: runs/accelerator, runs/accelerator_tiny)")
    parser.add_argument(
        "--only", action="append", choices=names, metavar="ITEM", help=f"one of {', '.join(names)}; repeatable"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="the time for all items together (default: 8)")
    parser.add_argument("--again", action="store_true", help="also run items whose result is there")
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny sizes, for example on a CPU")
    parser.add_argument(
        "--golden", type=Path, default=ROOT.parent / "shared" / "golden" / "forward", help="folder of the golden models"
    )
    parser.add_argument("--commit", help="what to record as the commit (default: what git says)")
    args = parser.parse_args(argv)
    args.out = (args.out or ROOT / "runs" / ("accelerator_tiny" if args.tiny else "accelerator")).absolute()
    args.golden = args.golden.absolute()
    return args


def run_item(item: Item, limit: float, args: argparse.Namespace) -> report.Result:
    """Runs an item in a process of its own and says what became of it.

    Args:
        item: the item.
        limit: the seconds that it may take.
        args: the command line.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result: report.Result = {
        "status": "no time left",
        "date": now,
        "limit": max(limit, 0.0),
        "seconds": 0.0,
        "rows": [],
    }
    if limit < LEAST:
        return {**result, "reason": "the same command takes it up"}
    folder = args.out / item.name
    folder.mkdir(exist_ok=True)
    record, log = folder / "findings.jsonl", folder / "log.txt"
    record.unlink(missing_ok=True)
    command = [*CHILD, item.name, "--record", str(record)]
    command += ["--out", str(folder / "work"), "--golden", str(args.golden), "--seconds", str(limit)]
    command += ["--tiny"] if args.tiny else []
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(args.out),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ending = wait(process, limit)
    return {**result, **outcome(record, ending, process.returncode, limit, log), "seconds": time.monotonic() - begin}


def environment(out: Path) -> dict[str, str]:
    """Returns the environment of the items: nine tenths of a GPU for JAX, and programs kept for the next call."""
    given = dict(os.environ)
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & given.keys():
        given["XLA_CLIENT_MEM_FRACTION"] = "0.9"  # as launch/gpu.sh; JAX refuses to start with both names set
    given.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "programs"))
    # Every item makes weights by the same dozen programs, most of which compile in less than JAX's own bound of a second.
    given.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    given["JAXBLOCK_DISTRIBUTED"] = "0"
    given["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), given.get("PYTHONPATH"))))
    return given


def wait(process: subprocess.Popen[bytes], limit: float) -> str | None:
    """Waits for an item, and ends it with all that it started where it takes too long or the kit is told to stop.

    Returns:
        Why it was ended; None where it ended by itself.
    """
    try:
        process.wait(limit)
        return None
    except subprocess.TimeoutExpired:
        return "time limit"
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started: it is asked first, and killed a little later."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def outcome(record: Path, ending: str | None, code: int, limit: float, log: Path) -> dict[str, Any]:
    """Puts together what an item wrote and how its process ended."""
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    found: dict[str, Any] = {"rows": [], "environment": None}
    for line in lines:
        try:
            ((kind, value),) = json.loads(line).items()
        except ValueError:  # the process was killed while it wrote this line
            continue
        if kind == "row":
            found["rows"].append(value)
        elif kind == "environment":
            found["environment"] = value
        else:
            found.update(value)
    if "status" in found:
        return found
    if ending is not None:
        why = f"it took longer than {limit:.0f} s" if ending == "time limit" else "the kit was told to stop"
        return {**found, "status": ending, "reason": why}
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return {**found, "status": "crashed", "reason": f"{how}; last words: {said[-1][:300] if said else 'none'}"}


def find_commit() -> str:
    """Returns the commit of this checkout, marked where files differ from it."""
    try:
        commit = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], text=True).strip()
        changed = subprocess.check_output(["git", "-C", str(ROOT), "status", "--porcelain"], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known (no git here; --commit names it)"
    return commit + (" with changes" if changed else "")


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT)
    )  # ends like Ctrl-C: the item is ended too
    sys.exit(main())

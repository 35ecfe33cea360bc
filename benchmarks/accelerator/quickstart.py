"""The item that runs the quickstart's verbs, as ``launch/quickstart.sh`` does, with training cut short where the time is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.accelerator.device_items import Context
from benchmarks.accelerator.measure import NoTime, Row, Rows
from jaxblock.cli import main as jaxblock_main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STOPPED = 143
"""The exit code of a run that SIGTERM told to save and stop."""
SHARES = {"classical": 0.3, "blockwise": 0.6}
"""The share of the time left at its beginning that each training run may take."""


def quickstart(context: Context) -> Rows:
    """Prepares the data, trains the two stages and scores both; each stage may take a share of the time left."""
    least = context.sizes.quickstart_least
    if context.seconds < least:
        raise NoTime(
            f"{context.seconds:.0f} s are left, and it is begun with {least:.0f} s or more: give more --minutes"
        )
    shutil.rmtree(context.out, ignore_errors=True)
    end = time.monotonic() + context.seconds
    classical, blockwise = (str(CONFIGS / f"quickstart_{name}.yaml") for name in ("classical", "blockwise"))
    prepared = ("--data.prepared", str(context.out / "prepared"))

    def phase(name: str, verb: str, *flags: str) -> Row:
        begin = time.perf_counter()
        code = jaxblock_main([verb, *flags, *prepared, *context.sizes.quickstart_flags.get(verb, ())])
        if code not in (0, STOPPED):
            raise RuntimeError(f"the phase '{name}' ended with exit code {code}: log.txt says why")
        cut = {"cut short": "yes, the time was short"} if code == STOPPED else {}
        return {"case": name, "wall time, s": time.perf_counter() - begin, **cut}

    yield phase("prepare", "prepare", "--config", classical)
    starts = {
        "classical": ("--config", classical),
        "blockwise": ("--config", blockwise, "--model.init_from", str(context.out / "classical")),
    }
    for stage, flags in starts.items():
        run, score = context.out / stage, context.out / f"score_{stage}"
        with _told_to_stop_after(SHARES[stage] * (end - time.monotonic())):
            row = phase(f"train, {stage}", "train", *flags, "--train.out", str(run))
        yield {**row, **_trained(run)}
        scoring = ("--config", blockwise, "--checkpoint", str(run), "--out", str(score))
        yield {**phase(f"score, {stage}", "evaluate", *scoring), **_scored(score)}


@contextmanager
def _told_to_stop_after(seconds: float) -> Iterator[None]:
    """Sends this process SIGTERM once the time is up, and again until the block ends: training saves and stops.

    Before training has begun to listen the signal is ignored, which is why it is repeated.
    """
    ended = threading.Event()

    def stop() -> None:
        wait = max(seconds, 0.0)
        while not ended.wait(wait):
            os.kill(os.getpid(), signal.SIGTERM)
            wait = 1.0

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


def _trained(run: Path) -> Row:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row.get("kind") == "train"]
    if not steps:
        return {"steps": 0}
    return {"steps": steps[-1]["step"], "tokens/s": steps[-1]["tokens_per_second"], "loss": steps[-1]["loss"]}


def _scored(folder: Path) -> Row:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    solved, bound = summary["pass_at_1"], summary["nelbo_per_token"]
    return {
        "Pass@1": f"{solved['correct']} of {solved['n']} ({solved['low']:.1%} to {solved['high']:.1%})",
        "NELBO per text token, nats": bound["mean"],
    }

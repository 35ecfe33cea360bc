"""Measures the memory that a run takes until its state is on the devices: when it begins, and when it is resumed.

The run begins in one process, which saves its first state, and is resumed in another. Measured are the largest sum of the
live arrays' bytes (on an accelerator, device memory), and the process's peak memory above what it had before loading, until the
state is loaded and until the first step is done. On a CPU, the arrays themselves are in the process's memory.

    python -m benchmarks.resume_memory
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
from rich.console import Console

import jaxblock
from benchmarks.host_time import settings
from benchmarks.load_checkpoint import peak_bytes
from benchmarks.sessions import first_step, loaded_session
from jaxblock.config.config import Config
from jaxblock.data.store.prepare import prepare
from jaxblock.fit.shapes import bytes_per_device
from jaxblock.parallel.host_memory import keep_freed_memory
from jaxblock.training.resume import saved_values
from jaxblock.training.session import Session

WATCHED = str(Path(jaxblock.__file__).parent / "training")
"""Functions of this room make, restore and hold the state; to look after every function of all rooms takes ten times as long."""


class LiveBytes:
    """Watches the bytes of one device that live arrays take, at every return from a function of `jaxblock.training`.

    Attributes:
        peak: the largest sum so far, without the arrays that were there before.
    """

    def __enter__(self) -> LiveBytes:
        """Begins to watch."""
        gc.collect()
        self.peak, self._before = 0, bytes_per_device(jax.live_arrays())
        sys.setprofile(self._look)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stops watching."""
        sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if event == "return" and code.co_filename.startswith(WATCHED) and not code.co_name.startswith("<"):
            self.peak = max(self.peak, bytes_per_device(jax.live_arrays()) - self._before)


def save_first_state(session: Session) -> None:
    """Saves a session's state as its run's first checkpoint, from which the run is then resumed."""
    arch = session.learner.net.arch
    session.checkpoints.save(session.state, 1, saved_values(session.config, session.prepared, arch, session.base))
    session.checkpoints.close()


def measure(config: Config) -> dict[str, float]:
    """Measures one start or resume in this process, in bytes; a run that begins saves its state afterwards."""
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    before = peak_bytes()
    with LiveBytes() as live:
        session = loaded_session(config, Console(quiet=True))
        jax.block_until_ready(session.state)
    found = {"live": live.peak, "process": peak_bytes() - before, "state": bytes_per_device(session.state)}
    state = first_step(session)
    found["step"] = peak_bytes() - before
    if session.resumed:
        session.checkpoints.close()
    else:
        save_first_state(dataclasses.replace(session, state=state))
    return {name: float(value) for name, value in found.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Prints the numbers of a start and of a resume."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d", 768), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ema", type=float, default=0.0, help="keep a moving average of the parameters")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        config = settings(Path(args.measure), args.d, args.layers, 8)
        found = measure(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema=args.ema)))
        print(json.dumps(found))
        return {"measured": found}
    sizes = ["--d", str(args.d), "--layers", str(args.layers), "--ema", str(args.ema)]
    with tempfile.TemporaryDirectory() as folder:
        config = settings(Path(folder), args.d, args.layers, 8)
        prepare(config.data, config.canvas)
        command = [sys.executable, "-m", "benchmarks.resume_memory", *sizes, "--measure", folder]
        outputs = [subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout for _ in range(2)]
    start, resume = (json.loads(output.splitlines()[-1]) for output in outputs)
    print(f"state of {start['state'] / 1e9:.3f} GB: d {args.d}, {args.layers} layers, ema {args.ema:g}")
    print("| | start | resume | resume / start |")
    print("|---|---|---|---|")
    shown = {"live": "live arrays", "process": "the process", "step": "the process, until the first step is done"}
    for name, what in shown.items():
        ratio = resume[name] / start[name]
        print(f"| {what} | {start[name] / 1e9:.3f} GB | {resume[name] / 1e9:.3f} GB | {ratio:.3f} |")
    return {"start": start, "resume": resume}


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()

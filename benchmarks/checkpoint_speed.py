"""Measures saving and restoring: GB/s, how long a save stops the loop, and a restart's time to its first step.

The state has the size asked for and is really trained, one step after the other; steps follow every save while it is
written in the background. Restoring includes the check of every byte against the checksums.

    python -m benchmarks.checkpoint_speed
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from benchmarks.host_time import settings
from benchmarks.sessions import first_step, loaded_session, train_batches
from jaxblock.data.store.prepare import prepare
from jaxblock.parallel.host_memory import keep_freed_memory
from jaxblock.training.resume import saved_values
from jaxblock.training.session import Session
from jaxblock.training.step import jit_step


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Prints the numbers of a few saves and one restart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d", 1024), ("layers", 6), ("batch", 8), ("saves", 2), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        config = settings(Path(name), args.d, args.layers, args.batch)
        prepare(config.data, config.canvas)
        session = loaded_session(config, Console(quiet=True))
        with jax.set_mesh(session.mesh):
            found = measure(session, args.saves, args.steps)
        begin = time.perf_counter()
        again = loaded_session(dataclasses.replace(config), Console(quiet=True))
        found["restore"] = time.perf_counter() - begin
        first_step(again)
        found["restart"] = time.perf_counter() - begin
        again.checkpoints.close()
    size = found["GB"]
    print(f"state of {size:.2f} GB: d {args.d}, {args.layers} layers, batch {args.batch}, {jax.devices()[0]}")
    print(f"step        {found['step']:8.3f} s")
    print(f"stands still{found['still']:8.3f} s a save = {found['still'] / found['step']:.2f} steps (below 1 wanted)")
    print(f"save        {found['save']:8.3f} s until it is whole = {size / found['save']:.2f} GB/s, training beside it")
    print(
        f"restore     {found['restore']:8.3f} s of set-up, checksums and reading = {size / found['restore']:.2f} GB/s"
    )
    print(f"restart     {found['restart']:8.3f} s from set-up to the end of the first step (compiling included)")
    return found


def measure(session: Session, saves: int, steps: int) -> dict[str, float]:
    """Measures the time in seconds of a step, of the loop's stop for a save, and of a save with its checksums (medians)."""
    data, state = train_batches(session), session.state
    step_fn = jit_step(session.learner, state, session.mesh)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9
    alone, still, whole = [], [], []
    kept = saved_values(session.config, session.prepared, session.learner.net.arch, session.base)
    done = 0
    for at in range(2 + steps):
        begin = time.perf_counter()
        state, metrics = step_fn(state, session.on_mesh(next(data)), {})
        jax.block_until_ready(metrics)
        done += 1
        if at >= 2:
            alone.append(time.perf_counter() - begin)
    for at in range(1 + saves):
        jax.block_until_ready(state)
        begin = time.perf_counter()
        session.checkpoints.save(state, done, kept)
        stopped = time.perf_counter() - begin
        for _ in range(2):
            state, metrics = step_fn(state, session.on_mesh(next(data)), {})
            jax.block_until_ready(metrics)
            done += 1
        session.checkpoints.wait()
        if at:  # the first one compiles the check for NaN
            still.append(stopped)
            whole.append(time.perf_counter() - begin)
    session.checkpoints.close()
    medians = {name: statistics.median(found) for name, found in (("step", alone), ("still", still), ("save", whole))}
    return medians | {"GB": size}


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()

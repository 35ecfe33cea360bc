"""Measures the host's time in a train step: making and placing the next batch, dispatch, and the metrics of a log line.

The host's own work is timed while the device is idle (each step has ended before the next is prepared), so that no call
contains a wait; the step's time is that of the loop as it runs, without waiting. On a CPU the host and the device share the
cores, so that the share is an upper bound.

    python -m benchmarks.host_time
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from benchmarks.sessions import loaded_session
from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.data.loader import BatchAt, batches
from jaxblock.data.store.prepare import prepare
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.models.config import ModelConfig
from jaxblock.parallel.host_memory import keep_freed_memory
from jaxblock.training.config import TrainConfig
from jaxblock.training.observe.window import summarise
from jaxblock.training.optim.config import OptimizerConfig
from jaxblock.training.step import jit_step


def settings(folder: Path, d: int, layers: int, batch: int) -> Config:
    """Returns the config of a run on the built-in corpus."""
    return Config(
        data=DataConfig(prepared=str(folder / "prepared"), builtin_train=1000, builtin_test=64, validation_records=8),
        canvas=CanvasConfig(prompt_len=56, response_len=24, block=8),
        method=MethodConfig(law="stratified_count"),
        model=ModelConfig(d_model=d, n_layers=layers, n_heads=4, mlp_dim=d * 8 // 3 // 8 * 8, scan_layers=layers > 4),
        optimizer=OptimizerConfig(warmup_steps=1),
        train=TrainConfig(out=str(folder / "run"), batch_size=batch, steps=10_000),
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Prints the milliseconds per step of each part, and the host's share of the step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d", 96), ("layers", 3), ("batch", 16), ("steps", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        config = settings(Path(name), args.d, args.layers, args.batch)
        prepare(config.data, config.canvas)
        session = loaded_session(config, Console(quiet=True))
        with jax.set_mesh(session.mesh):
            found = measure(session, config, args.steps)
        session.checkpoints.close()
    host = found["batch"] + found["place"] + found["dispatch"] + found["metrics"]
    found["share"] = host / found["step"]
    print(f"d {args.d}, {args.layers} layers, batch {args.batch}, {jax.devices()[0]}")
    for part in ("batch", "place", "dispatch", "metrics", "step"):
        print(f"{part:9}{found[part]:9.3f} ms")
    print(f"device   {found['device']:9.3f} ms (the same steps on one batch that is already there)")
    print(f"host     {host:9.3f} ms = {found['share']:.2%} of a step if nothing overlapped (below 5% wanted)")
    exposed = found["step"] - found["device"]
    print(
        f"exposed  {exposed:9.3f} ms = {exposed / found['step']:.2%} of a step: what the loop adds to the device's time"
    )
    return found


def measure(session, config: Config, steps: int) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Measures medians in milliseconds: each host part with the device idle, then the step of a free-running loop."""
    data = batches(
        BatchAt(session.prepared.records("train"), canvas=config.canvas, seed=0, batch_size=config.train.batch_size)
    )
    step_fn = jit_step(session.learner, session.state, session.mesh)
    state, window = session.state, []
    for _ in range(5):
        state, metrics = step_fn(state, session.on_mesh(next(data)), {})
    jax.block_until_ready(metrics)
    parts: dict[str, list[float]] = {"batch": [], "place": [], "dispatch": []}
    for _ in range(steps):
        marks = [time.perf_counter()]
        batch = next(data)
        marks.append(time.perf_counter())
        placed = session.on_mesh(batch)
        marks.append(time.perf_counter())
        state, metrics = step_fn(state, placed, {})
        marks.append(time.perf_counter())
        for part, (begin, end) in zip(parts.values(), zip(marks, marks[1:], strict=False), strict=True):
            part.append((end - begin) * 1e3)
        window.append(metrics)
        jax.block_until_ready(metrics)
    begin = time.perf_counter()
    summarise(jax.device_get(window[: config.train.log_every]))
    reading = (time.perf_counter() - begin) * 1e3 / config.train.log_every
    begin = time.perf_counter()
    for _ in range(steps):
        state, metrics = step_fn(state, session.on_mesh(next(data)), {})
    jax.block_until_ready(metrics)
    step = (time.perf_counter() - begin) * 1e3 / steps
    begin = time.perf_counter()
    for _ in range(steps):
        state, metrics = step_fn(state, placed, {})
    jax.block_until_ready(metrics)
    device = (time.perf_counter() - begin) * 1e3 / steps
    medians = {name: statistics.median(values) for name, values in parts.items()}
    return medians | {"metrics": reading, "step": step, "device": device}


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()

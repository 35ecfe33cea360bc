"""Real processes train as one (launch/local_pod.sh): the same draws and losses, one run folder, one stop for all.

    python -m tests.training.test_processes LINES STOP train --config FILE ...

trains, and writes down what no metric shows. Process 0 writes a line of JSON to LINES for the state that the run begins with
and for each step: ``step``, ``state`` (SHA-256 of parameters, optimizer state and average), and of the step before it
``drawn`` (of ids, lengths, draws and noise of the global batch) and ``loss``. After STOP (0: never) the last process sends
itself SIGTERM.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxblock.cli import main
from jaxblock.data.loader import BatchAt
from jaxblock.data.store.records import Record
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.parallel import rules
from jaxblock.training import loop
from jaxblock.training.observe.goodput import CAUSES
from jaxblock.training.session import Session
from jaxblock.training.step import Step
from tests import runs

ROOT = Path(__file__).parents[2]


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in runs.rows(run)]


def _group(processes: int, *command: str) -> list[str]:
    pod = [str(ROOT / "launch" / "local_pod.sh"), str(processes), "--devices", str(8 // processes)]
    return [*pod, "--", sys.executable, "-m", *command]


def _recorded(
    config: Path, processes: int, run: Path, stop: int, *flags: str, **variables: str
) -> tuple[dict[int, dict[str, Any]], str]:
    """Trains one more part of a run; returns what is noted of each of its steps, and what was printed."""
    lines = run.parent / f"{run.name}-{processes}.jsonl"
    command = ["tests.training.test_processes", str(lines), str(stop), "train", "--config", str(config)]
    command += ["--train.out", str(run), "--train.log_every", "1", *runs.QUIET, *flags]
    how: Any = {"env": os.environ | variables, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 400}
    done = subprocess.run(_group(processes, *command), **how)
    assert done.returncode == (143 if stop else 0), done.stderr
    return {row["step"]: row for row in map(json.loads, lines.read_text().splitlines())}, done.stderr


@pytest.mark.slow
def test_four_processes_are_stopped_and_two_and_one_go_on_exactly(tiny_config, tmp_path):
    """Trains on 4 x 2 devices, then on 2 x 4 and 1 x 8, each with parameters split another way; after 1 x 8 on 2 x 4 again."""

    def part(processes: int, run: Path, stop: int, fsdp: int) -> dict[int, dict[str, Any]]:
        flags = f"--train.fsdp {fsdp} --train.save_every 6 --optimizer.ema 0.9".split()
        return _recorded(tiny_config, processes, run, stop, *flags)[0]

    run, copy = tmp_path / "run", tmp_path / "copy"
    four = part(4, run, 9, fsdp=4)
    last = max(four)
    assert {int(entry.name) for entry in (run / "checkpoints").iterdir()} == {6, last} and 9 <= last <= 10
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / str(last))  # from the one before, all three train the same steps
    two, one = part(2, run, last + 2, fsdp=2), part(1, copy, last + 2, fsdp=8)
    assert (min(two), min(one)) == (last, 6)
    assert two[last]["state"] == four[last]["state"] and one[6]["state"] == four[6]["state"]
    assert one[7]["loss"] == pytest.approx(four[7]["loss"], rel=1e-6)
    assert two[last + 1]["loss"] == pytest.approx(one[last + 1]["loss"], rel=1e-6)
    assert [step for step, _ in _losses(run)] == list(range(1, max(two) + 1))
    grown = part(2, copy, max(one) + 2, fsdp=4)
    assert min(grown) == max(one) and grown[max(one)]["state"] == one[max(one)]["state"]

    # Ids, draws and noise are those that one process draws that never stopped.
    config = runs.config(tiny_config, "--train.out", str(tmp_path / "straight"), *runs.QUIET)
    session = runs.session(config)
    records = session.prepared.records("train")
    rows = BatchAt(records, canvas=config.canvas, seed=0, batch_size=8, kind="per_sequence")
    with jax.set_mesh(session.mesh):
        drawn = draws(session)
        expected = {step + 1: drawn(session.on_mesh(rows(step)), step) for step in range(max(grown))}
    session.checkpoints.close()
    for name, found in {"four": four, "two": two, "one": one, "grown": grown}.items():
        noted = {step: row["drawn"] for step, row in found.items() if "drawn" in row}
        assert len(noted) >= 2 and noted == {step: expected[step] for step in noted}, name


@pytest.mark.parametrize("kind", ["per_sequence", "pairs"])
def test_each_process_reads_only_its_rows(kind):
    """``tests/data/test_loader.py`` shows that all of them together are the batch."""

    class Counted(list[Record]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    read: list[int] = []
    records = Counted(Record(np.array([1, 2, i]), np.array([4, i, 5]), "", "", "", i) for i in range(23))
    options: Any = {"canvas": CanvasConfig(8, 4, 2), "seed": 3, "batch_size": 12, "kind": kind}
    for count, step in itertools.product((2, 3, 4), (0, 1, 7)):
        for part in (BatchAt(records, **options, process_index=i, process_count=count) for i in range(count)):
            read.clear()
            assert part(step).index.tolist() == read and len(read) == 12 // count


@pytest.mark.slow
def test_two_processes_share_trackers_time_and_traces(tiny_config, tmp_path):
    pytest.importorskip("wandb"), pytest.importorskip("tensorboardX")
    homes = {name: str(tmp_path / name) for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")}
    flags = ["--train.tensorboard", "--train.wandb", "offline", "--profile", "4", "5", "--train.steps", "12"]
    run = tmp_path / "run"
    _, said = _recorded(tiny_config, 2, run, 0, *flags, **homes)
    # Process 0 alone writes what is one file for all; each of the two writes its own trace.
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1 and (run / "wandb.json").exists()
    assert [step for step, _ in _losses(run)] == list(range(1, 13))
    traces = sorted(path.relative_to(run / "profile").parts[0] for path in (run / "profile").rglob("*.xplane.pb"))
    assert traces == ["process-0", "process-1"]
    assert said.count("the trace is in") == said.count("goodput ") == 1
    assert set(runs.rows(run, "goodput")[-1]["seconds"]) == set(CAUSES)


def digest(tree: Any) -> str:
    """Returns the SHA-256 of all leaves, which are whole in every process."""
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()


def draws(session: Session) -> Callable[[Any, int], str]:
    """Returns a function of a batch on the mesh and a step to the digest of the batch and of all that is drawn for it."""
    objective, whole = session.learner.objective, rules.replicated(session.mesh)

    def everything(batch: Any, step: Any) -> Any:
        return batch, objective.draw(batch, objective.canvas(batch), step)

    compiled = jax.jit(everything, out_shardings=whole)
    return lambda batch, step: digest(compiled(batch, step))


def recorded(session: Session, step_fn: Step, file: Path, stop: int) -> Step:
    """Returns the step with a recorder around it."""
    whole = jax.jit(lambda tree: tree, out_shardings=rules.replicated(session.mesh))
    drawn, counter = draws(session), itertools.count(session.step)

    def note(state: Any, **row: Any) -> None:
        row["state"] = digest(whole((state.params, state.opt_state, state.average)))
        if jax.process_index() == 0:
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")

    def recorded_step(state: Any, batch: Any, frozen: Any) -> Any:
        step = next(counter)
        found = drawn(batch, step)
        state, metrics = step_fn(state, batch, frozen)
        total, weight = metrics.losses.loss
        note(state, step=step + 1, drawn=found, loss=float(total) / float(weight))
        if step + 1 == stop and session.process_index == session.process_count - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return state, metrics

    note(session.state, step=session.step)
    return recorded_step


if __name__ == "__main__":
    lines, stop_at, *rest = sys.argv[1:]
    run = loop.run

    def recorded_loop(session: Session, step_fn: Step, *others: Any) -> Any:
        with jax.set_mesh(session.mesh):
            step_fn = recorded(session, step_fn, Path(lines), int(stop_at))
        return run(session, step_fn, *others)

    loop.run = recorded_loop
    sys.exit(main(rest))

"""Real processes train as one (launch/local_pod.sh): the same draws and losses, one run folder, one stop for all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import process_drift
from jaxblock.data.loader import Batch, BatchAt
from jaxblock.data.store.records import Record
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.training.observe.goodput import CAUSES
from tests import runs
from tests.training.recorded_run import draws

ROOT = Path(__file__).parents[2]
POD = ROOT / "launch" / "local_pod.sh"


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in runs.rows(run)]


def _group(processes: int, *command: str) -> list[str]:
    return [str(POD), str(processes), "--devices", str(8 // processes), "--", sys.executable, "-m", *command]


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path: Path) -> None:
    (found,) = process_drift.compare(tmp_path, [(1, 8), (2, 4)], steps=20, d=16, layers=2)
    assert found["drawn_equal"] == 20  # ids, lengths, draws and noise of every step, bit for bit
    assert found["loss_step_1"] <= 1e-6
    assert found["loss_worst"] <= 1e-4  # 0 was measured after 100 steps (docs/benchmarks.md)


@pytest.mark.slow
def test_ctrl_c_to_one_stops_all_at_one_step(tiny_config: Path, tmp_path: Path) -> None:
    """Process 1 alone is told. (What other numbers of processes do with its checkpoint: the four processes below.)"""
    run, pids, said = tmp_path / "group", {}, []
    flags = ["train", "--config", str(tiny_config), "--train.out", str(run), *runs.QUIET, "--train.log_every", "2"]
    with subprocess.Popen(_group(2, "jaxblock", *flags), cwd=ROOT, stderr=subprocess.PIPE, text=True) as group:
        assert group.stderr is not None
        for line in group.stderr:
            said.append(line)
            if found := re.match(r"process (\d) is (\d+)", line):
                pids[found[1]] = int(found[2])
            if "step 10/" in line:
                os.kill(pids["1"], signal.SIGINT)
    text = "".join(said)
    assert group.returncode == 130 and "ending the others" not in text and "and saved" in text, text
    last = _losses(run)[-1][0]
    assert 10 <= last < 120 and (run / "checkpoints" / str(last)).is_dir()


def _recorded(
    config: Path, processes: int, run: Path, stop: int, *flags: str, **variables: str
) -> tuple[list[dict[str, Any]], str]:
    """Trains one more part of a run; returns what recorded_run notes of it, and what was printed."""
    lines = run.parent / f"{run.name}-{processes}.jsonl"
    command = ["tests.training.recorded_run", str(lines), str(stop), "train", "--config", str(config)]
    command += ["--train.out", str(run), "--train.log_every", "1", *runs.QUIET, *flags]
    how: Any = {"env": os.environ | variables, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 400}
    done = subprocess.run(_group(processes, *command), **how)
    assert done.returncode == (143 if stop else 0), done.stderr
    return [json.loads(line) for line in lines.read_text().splitlines()], done.stderr


@pytest.mark.slow
def test_four_processes_are_stopped_and_two_and_one_go_on_exactly(tiny_config: Path, tmp_path: Path) -> None:
    """Trains on 4 x 2 devices, then on 2 x 4 and 1 x 8, each with parameters split another way; after 1 x 8 on 2 x 4 again."""

    def part(processes: int, run: Path, stop: int, fsdp: int) -> dict[int, dict[str, Any]]:
        flags = ["--train.fsdp", str(fsdp), "--train.save_every", "6", "--optimizer.ema", "0.9"]
        return {row["step"]: row for row in _recorded(tiny_config, processes, run, stop, *flags)[0]}

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
def test_each_process_reads_only_its_rows(kind: Any) -> None:
    class Counted(list[Record]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    read: list[int] = []
    records = Counted(Record(np.array([1, 2, i]), np.array([4, i, 5]), "", "", "", i) for i in range(23))
    options: Any = {"canvas": CanvasConfig(8, 4, 2), "seed": 3, "batch_size": 12, "kind": kind}
    alone = BatchAt(records, **options)
    for count in (2, 3, 4):
        parts = [BatchAt(records, **options, process_index=i, process_count=count) for i in range(count)]
        for step in (0, 1, 7):
            whole, rows = alone(step), []
            for part in parts:
                read.clear()
                rows.append(part(step))
                assert read == rows[-1].index.tolist() and len(read) == 12 // count
            joined = Batch(*(np.concatenate(leaves) for leaves in zip(*rows, strict=True)))
            for ours, theirs in zip(joined, whole, strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_two_processes_share_trackers_time_and_traces(tiny_config: Path, tmp_path: Path) -> None:
    wandb, _ = pytest.importorskip("wandb"), pytest.importorskip("tensorboardX")
    assert wandb.__version__
    homes = {name: str(tmp_path / name) for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")}
    flags = ["--train.tensorboard", "--train.wandb", "offline", "--profile", "4", "5", "--train.steps", "12"]
    _, said = _recorded(tiny_config, 2, tmp_path / "run", 0, *flags, **homes)
    run = tmp_path / "run"
    # Process 0 alone writes what is one file for all; each of the two writes its own trace.
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1 and (run / "wandb.json").exists()
    assert [step for step, _ in _losses(run)] == list(range(1, 13))
    traces = sorted(path.relative_to(run / "profile").parts[0] for path in (run / "profile").rglob("*.xplane.pb"))
    assert traces == ["process-0", "process-1"]
    assert said.count("the trace is in") == said.count("goodput ") == 1
    assert set(runs.rows(run, "goodput")[-1]["seconds"]) == set(CAUSES)

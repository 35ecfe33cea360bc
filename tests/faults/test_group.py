"""Tests two real processes: what one of them finds, damage or a poisoned batch, counts for both."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import chex
import jax
import pytest

import jaxblock
from jaxblock.config.yaml import load_config
from jaxblock.data.loader import BatchAt
from jaxblock.data.store.prepared_folder import open_prepared
from tests import runs

ROOT = Path(__file__).parents[2]
POISONED = 4


def _train(config: Path, run: Path) -> str:
    """Runs two processes, each with half of every parameter, to the end. Returns what they print."""
    command = [str(ROOT / "launch" / "local_pod.sh"), "2", "--devices", "1", "--", sys.executable, "-m"]
    command += ["tests.faults.poisoned_run", str(POISONED), "train", "--config", str(config), "--train.out", str(run)]
    command += ["--train.fsdp", "2", "--train.steps", "12", "--train.save_every", "6", "--train.keep", "3", *runs.QUIET]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stderr


def _flip(folder: Path) -> str:
    """Flips a bit in a file that process 1 has written; returns the problem that must be reported."""
    path = max((folder / "params" / "ocdbt.process_1").rglob("d/*"), key=lambda file: file.stat().st_size)
    runs.flip_a_bit(path)
    return f"{path.relative_to(folder)} holds other bytes than were saved"


def _lose_the_list_of_process_1(folder: Path) -> str:
    (folder / "whole-1-of-2.json").unlink()
    return "it was never finished (whole-1-of-2.json is missing)"


def _rows(run: Path) -> list[tuple[object, ...]]:
    return [(row["step"], str(row["loss"]), row["lr"], row["skipped"]) for row in runs.rows(run)]


@pytest.mark.slow
def test_what_one_of_two_processes_finds_counts_for_both(tiny_config: Path, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    said = " ".join(_train(tiny_config, straight).replace("[0]", "").split())
    config = load_config(str(tiny_config))
    records = open_prepared(config.data.prepared).records("train")
    whole = BatchAt(records, canvas=config.canvas, seed=0, batch_size=8, kind="per_sequence")(POISONED - 1).index
    assert len(set(whole.tolist())) == 8
    assert f"skipped step {POISONED} (train records {', '.join(map(str, whole.tolist()))})" in said, said
    assert [row[0] for row in _rows(straight) if row[3]] == [POISONED]

    harms: list[Callable[[Path], str]] = [_flip, _lose_the_list_of_process_1]
    for harm in harms:
        run = tmp_path / harm.__name__
        shutil.copytree(straight, run)
        problem = harm(run / "checkpoints" / "12")
        said = " ".join(re.sub(r"^\[\d\] ", "", _train(tiny_config, run), flags=re.M).split())
        assert f"checkpoints/12 is not used: {problem}; moved to {run / 'damaged' / '12'}" in said, said
        assert "going on from step 6" in said
        chex.assert_trees_all_equal(*(jax.device_get(jaxblock.load(folder).params) for folder in (run, straight)))
        assert _rows(run) == _rows(straight)
        assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["12", "6"]

"""Tests two real processes: what one of them finds, damage or a poisoned batch, counts for both.

``python -m tests.faults.test_group STEP ...`` runs jaxblock's command line with NaN gradients in one step.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

import jaxblock
from jaxblock.cli import main
from jaxblock.config.yaml import load_config
from jaxblock.data.loader import BatchAt
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.training import step as steps
from tests import pod, runs

POISONED = 4


def _train(config: Path, run: Path) -> str:
    """Runs two processes, each with half of every parameter, to the end. Returns what they print, on one line."""
    by = (sys.executable, "-m", "tests.faults.test_group", str(POISONED))
    with pod.started(config, run, *["--train.steps", "9", "--train.save_every", "3"], by=by) as group:
        said = "".join(group.stderr)
    assert group.returncode == 0, said
    return " ".join(re.sub(r"^\[\d\] ", "", said, flags=re.M).split())


def _rows(run: Path) -> list[tuple[object, ...]]:
    return [(row["step"], str(row["loss"]), row["lr"], row["skipped"]) for row in runs.rows(run)]


@pytest.mark.slow
def test_what_one_of_two_processes_finds_counts_for_both(tiny_config, tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    said = _train(tiny_config, straight)
    config = load_config(str(tiny_config))
    records = open_prepared(config.data.prepared).records("train")
    whole = BatchAt(records, canvas=config.canvas, seed=0, batch_size=8, kind="per_sequence")(POISONED - 1).index
    assert len(set(whole.tolist())) == 8
    assert f"skipped step {POISONED} (train records {', '.join(map(str, whole.tolist()))})" in said, said
    assert [row[0] for row in _rows(straight) if row[3]] == [POISONED]
    # A bit of a file that process 1 has written is flipped, and of another checkpoint its list of files is lost.
    checkpoints = shutil.copytree(straight, run) / "checkpoints"
    damaged = max((checkpoints / "9/params/ocdbt.process_1").rglob("d/*"), key=lambda file: file.stat().st_size)
    runs.flip_a_bit(damaged)
    (checkpoints / "6/whole-1-of-2.json").unlink()
    other = f"{damaged.relative_to(checkpoints / '9')} holds other bytes than were saved"
    said = _train(tiny_config, run)
    for step, problem in (("9", other), ("6", "it was never finished (whole-1-of-2.json is missing)")):
        assert f"checkpoints/{step} is not used: {problem}; moved to {run / 'damaged' / step}" in said, said
    assert "going on from step 3" in said
    chex.assert_trees_all_equal(*(jax.device_get(jaxblock.load(folder).params) for folder in (run, straight)))
    assert _rows(run) == _rows(straight)
    assert sorted(entry.name for entry in checkpoints.iterdir()) == ["3", "6", "9"]


if __name__ == "__main__":
    bad, gradients = int(sys.argv[1]), steps.gradients

    def poisoned(objective: Any, params: Any, batch: Any, step: Any, *rest: Any) -> Any:
        found, grads = gradients(objective, params, batch, step, *rest)
        return found, jax.tree.map(lambda grad: jnp.where(step + 1 == bad, jnp.nan, grad), grads)

    steps.gradients = poisoned
    sys.exit(main(sys.argv[2:]))

"""Two real processes train as one: the same losses, one run folder, and one process may go on alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxblock
from jaxblock.cli import main


def _losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_config: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_config.parent / "group"
    flags = ["--config", str(tiny_config), "--train.out", str(run), "--train.fsdp", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    group = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "jaxblock", "train", *flags],
            env={**os.environ, **group, "JAX_PROCESS_ID": str(index)},
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "step 120/120" in said[0] and "step 120/120" not in said[1]

    (steps, losses), (expected_steps, expected) = (zip(*_losses(folder), strict=True) for folder in (run, tiny_run))
    assert steps == expected_steps == tuple(range(1, 121))
    np.testing.assert_allclose(losses[:20], expected[:20], rtol=1e-4)  # rounding grows with the steps
    for left, right in zip(
        jax.tree.leaves(jaxblock.load(run).params), jax.tree.leaves(jaxblock.load(tiny_run).params), strict=True
    ):
        assert np.isfinite(left).all() and left.shape == right.shape
    # A checkpoint of two processes is read by one.
    assert main(["train", *flags]) == 0
    assert "is finished (120 steps)" in capsys.readouterr().err

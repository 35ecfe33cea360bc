"""Real processes that die at any moment: nothing is lost, and the run ends as the one that was left alone."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxblock
from jaxblock.cli import main
from jaxblock.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
KILLS = 20


def _train(*flags: str, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jaxblock", "train", *flags]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, **environment}
    )


def _until(process: subprocess.Popen[bytes], seen: Callable[[str], bool]) -> str:
    """Reads what a process says until a line is as wanted (or it ends)."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line.decode()
        if seen(line.decode()):
            break
    return said


def _rows(run: Path) -> list[tuple[object, ...]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["kind"], row.get("loss"), row.get("grad_norm")) for row in rows if row["kind"] == "train"]


def _same(run: Path, expected: Path) -> None:
    left, right = (jax.tree.leaves(jaxblock.load(folder).params) for folder in (run, expected))
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)
    assert _rows(run) == _rows(expected)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tiny_config: Path, tiny_run: Path, record_property: Callable[..., None]) -> None:
    """SIGKILL at random: some while a step runs, some while a checkpoint is being written, sealed or deleted."""
    run, chance = tiny_config.parent / "killed20", random.Random(0)
    flags = ["--config", str(tiny_config), "--train.out", str(run), "--train.save_every", "3", "--train.keep", "2"]
    flags += ["--train.eval_every", "0", "--train.eval_problems", "0", "--train.eval_nelbo_rows", "0"]
    lost, done, during_a_save = [], 0, 0
    for _ in range(KILLS):
        process = _train(*flags)
        # Far enough to have saved once; then at a random line, or as soon as Orbax's unfinished folder is there.
        goal = min(done + chance.randint(4, 7), 119)
        said = _until(process, lambda line, goal=goal: bool(re.match(rf"step {goal}/", line)))
        if chance.random() < 0.5:
            folder = run / "checkpoints"
            while process.poll() is None and not any(
                "tmp" in name or "deleting" in name for name in os.listdir(folder)
            ):
                pass
        process.kill()
        process.communicate()
        assert "not used" not in said.replace("was never finished", "") or "never finished" in said, said
        before, done = done, max(Checkpoints(run).steps(), default=0)
        names = os.listdir(run / "checkpoints")
        during_a_save += any(not name.isdigit() for name in names)
        reached = [int(n) for n in re.findall(r"^step (\d+)/", said, re.M)]
        assert before <= done and reached and reached[0] == before + 1, (before, done, said)
        lost.append(max(reached) - done)
    assert main(["train", *flags]) == 0
    record_property("steps lost by each kill", lost)
    print(f"{KILLS} kills, {during_a_save} during a save or a deletion, steps lost (done again): {lost}")
    _same(run, tiny_run)


@pytest.mark.slow
def test_sigterm_saves_and_says_so_by_its_code(tiny_config: Path, tiny_run: Path) -> None:
    run = tiny_config.parent / "preempted"
    flags = [
        "--config",
        str(tiny_config),
        "--train.out",
        str(run),
        "--train.eval_every",
        "0",
        "--train.save_every",
        "100",
    ]
    process = _train(*flags)
    _until(process, lambda line: line.startswith("step 5/"))
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1].decode()
    assert process.returncode == 143 and "run the same command again" in said, said
    assert max(Checkpoints(run).steps()) >= 5


@pytest.mark.slow
def test_a_process_without_its_partner_ends_with_a_message(tiny_config: Path) -> None:
    """The other one is killed: no collective can end, so the runtime's heartbeat must."""
    run = tiny_config.parent / "partner"
    flags = ["--config", str(tiny_config), "--train.out", str(run), "--train.fsdp", "2", "--train.eval_every", "0"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    group = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": ""}
    first, second = (_train(*flags, **group, JAX_PROCESS_ID=str(index)) for index in range(2))
    _until(first, lambda line: line.startswith("step 5/"))
    second.kill()
    second.communicate()
    said = first.communicate(timeout=180)[1].decode()
    assert first.returncode != 0
    assert re.search("heartbeat|unhealthy|connection|Connection|closed by peer|process group", said), said[-3000:]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    largest = max((run / "checkpoints" / "120" / "params").rglob("d/*"), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 64
    largest.write_bytes(content)
    assert main(["decode", "--checkpoint", str(run), "1+1?"]) == 2
    assert "120 is damaged" in capsys.readouterr().err
    assert main(["decode", "--checkpoint", str(run), "--step", "100", "1+1?"]) == 0
    assert main(["train", "--config", str(tiny_config), "--train.out", str(run)]) == 0
    said = capsys.readouterr().err
    assert "checkpoints/120 is not used" in said and "going on from step 100" in said
    _same(run, tiny_run)


def test_a_better_checkpoint_outlives_newer_ones(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--train.out", str(run), "--train.steps", "12", "--train.eval_every", "3", "--train.save_every", "4"]
    flags += [
        "--train.eval_problems",
        "0",
        "--train.keep",
        "1",
        "--train.keep_best",
        "nelbo",
        "--train.keep_every",
        "4",
    ]
    assert main(["train", "--config", str(tiny_config), *flags]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    nelbo = {row["step"]: row["nelbo_per_token"]["mean"] for row in rows if row["kind"] == "eval" and row["step"]}
    best = min(nelbo, key=lambda step: nelbo[step])
    checkpoints = Checkpoints(run)
    assert checkpoints.best() == best and checkpoints.steps() == sorted({4, 8, 12, best})
    assert main(["decode", "--checkpoint", str(run), "--step", "best", "1+1?"]) == 0
    assert main(["decode", "--checkpoint", str(run), "--step", "7", "1+1?"]) == 2
    assert "no whole checkpoint of step 7; there are 4" in capsys.readouterr().err

"""A run that is stopped, killed or started again ends as the run that was left alone."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxblock
from jaxblock.cli import main
from jaxblock.config.yaml import load_config
from jaxblock.training import start

F_SETPIPE_SZ = 1031


def _params(run: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jaxblock.load(run).params)]


def _rows(run: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics without speeds, notes of resumption, and where the time went."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows if row["kind"] in ("train", "eval")
    ]


def _assert_same_run(run: Path, expected: Path) -> None:
    for left, right in zip(_params(run), _params(expected), strict=True):
        np.testing.assert_array_equal(left, right)
    assert _rows(run) == _rows(expected)


def _train_until(line: str, number: int, *arguments: str) -> tuple[int, str]:
    """A real process that gets a signal when it prints a line. Returns its exit code and what it printed.

    The pipe is small and read byte by byte: a run whose report fills it waits for us, so it cannot end before the signal.
    """
    read, write = os.pipe()
    fcntl.fcntl(write, F_SETPIPE_SZ, 4096)
    command = [sys.executable, "-m", "jaxblock", "train", *arguments]
    process = subprocess.Popen(command, stderr=write, stdout=write, cwd=Path(__file__).parents[2])
    os.close(write)
    said = b""
    while not said.rsplit(b"\n", 2)[-1].startswith(line.encode()) and (byte := os.read(read, 1)):
        said += byte
    process.send_signal(number)
    with os.fdopen(read, "rb") as rest:
        said += rest.read()
    return process.wait(), said.decode()


def test_killed_then_interrupted_then_resumed_is_the_straight_run(tiny_config: Path, tiny_run: Path) -> None:
    run = tiny_config.parent / "interrupted"
    command = ["--config", str(tiny_config), "--train.out", str(run)]
    code, _ = _train_until("step 3/", signal.SIGKILL, *command)  # before the first checkpoint
    assert code == -signal.SIGKILL
    code, said = _train_until("step 7/", signal.SIGINT, *command)
    assert code == 130, said
    assert "ended before its first checkpoint: beginning again" in said
    assert "To go on, run the same command again" in said and str(run) in said
    assert "Traceback" not in said
    before = len(_rows(run))
    assert main(["train", *command]) == 0
    assert 7 < before < len(_rows(run))
    _assert_same_run(run, tiny_run)


@pytest.mark.slow
def test_killed_between_checkpoints_then_resumed_is_the_straight_run(tiny_config: Path, tiny_run: Path) -> None:
    run = tiny_config.parent / "killed"
    command = ["--config", str(tiny_config), "--train.out", str(run), "--train.save_every", "10"]
    code, _ = _train_until("step 36/", signal.SIGKILL, *command)
    assert code == -signal.SIGKILL
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "ki')  # what a kill in the middle of a write leaves
    assert main(["train", *command]) == 0
    _assert_same_run(run, tiny_run)


@pytest.mark.slow
def test_terminal_interrupt_reaches_no_worker_process(tiny_config: Path, tiny_run: Path) -> None:
    """Ctrl-C goes to the whole group of processes: the workers must not die of it with tracebacks."""
    run = tiny_config.parent / "workers"
    command = ["--config", str(tiny_config), "--train.out", str(run), "--train.loader_workers", "2"]
    script = f"import os, sys; os.setpgrp(); sys.argv = ['jaxblock', 'train', *{command!r}]\n"
    script += "import signal; from jaxblock.cli import main\n"
    script += "signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGINT)); sys.exit(main())"
    read, write = os.pipe()
    fcntl.fcntl(write, F_SETPIPE_SZ, 4096)
    process = subprocess.Popen([sys.executable, "-c", script], stderr=write, cwd=Path(__file__).parents[2])
    os.close(write)
    said = b""
    while b"step 7/" not in said and (byte := os.read(read, 1)):
        said += byte
    process.send_signal(signal.SIGUSR1)
    with os.fdopen(read, "rb") as rest:
        said += rest.read()
    assert process.wait() == 130, said.decode()
    assert b"Traceback" not in said, said.decode()
    assert main(["train", *command]) == 0
    _assert_same_run(run, tiny_run)


def test_a_finished_run_says_so_and_reads_no_weights(
    tiny_config: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (tiny_run / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(start, "load_session", None)
    assert main(["train", "--config", str(tiny_config)]) == 0
    assert "is finished (120 steps); nothing to do" in capsys.readouterr().err
    assert (tiny_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer.lr", "0.5"], "optimizer.lr = 0.01 then, 0.5 now"),
        (["--train.seed", "1"], "train.seed = 0 then, 1 now"),
        (["--train.steps", "130"], "train.steps = 120 then, 130 now"),
        (
            ["--method.law", "bernoulli", "--canvas.block", "8"],
            "canvas.block = 4 then, 8 now; method.law = 'exact_count'",
        ),
        (["--model.d_model", "32"], "model.d_model = 16 then, 32 now"),
        (["--train.resume", "never"], "already holds a run"),
        (["--train.resume", "must", "--train.out", "{new}"], "train.resume is must, but {new} has no whole checkpoint"),
        (["--train.out", "{full}"], "holds no config.yaml, so it is not replaced"),
    ],
)
def test_what_is_no_exact_resume_is_refused(
    tiny_config: Path,
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("all my work")
    names = {"new": tmp_path / "new", "full": tmp_path / "full"}
    assert main(["train", "--config", str(tiny_config), *(flag.format(**names) for flag in flags)]) == 2
    assert message.format(**names) in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "new").exists()


def test_what_does_not_change_learning_may_change(tiny_config: Path, tiny_run: Path) -> None:
    flags = ["--train.log_every", "7", "--train.eval_every", "0", "--train.resume", "must", "--model.remat", "full"]
    flags += ["--decode.temperature", "0.5", "--evaluate.grader", "exact", "--train.fsdp", "2"]
    assert main(["train", "--config", str(tiny_config), *flags]) == 0


def test_other_data_are_refused(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumes with the same settings after the file of records has changed."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_config.parent, folder, ignore=lambda at, names: {n for n in names if n not in KEPT})
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[::-1]))
    config = dataclasses.replace(load_config(str(tiny_config)).data, train=str(folder / "train.jsonl"))
    flags = ["--data.train", config.train, "--data.prepared", str(folder / "prepared")]
    assert main(["prepare", "--config", str(tiny_config), *flags]) == 0
    flags = ["--data.prepared", str(folder / "prepared")]
    assert main(["train", "--config", str(tiny_config), *flags]) == 2
    assert "was trained on other data" in capsys.readouterr().err


KEPT = {"train.jsonl", "test.jsonl"}


def test_the_other_start_of_a_run_without_checkpoint_is_refused(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run killed before its first checkpoint begins again, but only as the same run."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints"))
    command = ["train", "--config", str(tiny_config), "--train.out", str(run)]
    assert main([*command, "--model.init_from", str(tiny_run)]) == 2
    assert f"model.init_from = None then, '{tiny_run}' now" in capsys.readouterr().err
    assert main(["decode", "--checkpoint", str(run), "1+1?"]) == 2
    assert "has no whole checkpoint yet" in capsys.readouterr().err

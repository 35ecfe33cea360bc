"""A run that is stopped, killed or started again ends as the run that was left alone."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxblock.cli import main
from jaxblock.io.locks import only_writer
from jaxblock.training import start
from jaxblock.training.observe.window import StepWindow
from tests import runs

F_SETPIPE_SZ = 1031


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this process send itself Ctrl-C when a run has dispatched a step."""
    due, add = [0], StepWindow.add

    def sent(window: StepWindow, step: int, *rest: Any) -> None:
        add(window, step, *rest)
        if step == due[0]:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StepWindow, "add", sent)
    return lambda step: due.__setitem__(0, step)


def test_interrupted_before_and_after_a_checkpoint_then_resumed_is_the_straight_run(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], signalled: Any
) -> None:
    run = tmp_path / "run"
    command = ["train", "--config", str(tiny_config), "--train.out", str(run)]
    # A run that was killed before its first checkpoint begins again.
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "had_checkpoint.json"))
    signalled(3)
    assert main(command) == 130
    said = capsys.readouterr().err
    assert "has no whole checkpoint: beginning again" in said
    assert "To go on, run the same command again" in said and str(run) in said
    assert runs.rows(run) == runs.rows(tiny_run)[:3]
    # From its checkpoint of step 100, with what a kill in the middle of a write leaves of the metrics.
    shutil.rmtree(run)
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "checkpoints" / "120")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "ki')
    signalled(107)
    assert main(command) == 130
    assert [row["step"] for row in runs.rows(run)] == list(range(1, 108))
    assert main([*command, "--train.resume", "must"]) == 0
    runs.check_same(run, tiny_run)


def _train_until(line: str, number: int, *command: str) -> tuple[int, str]:
    """Runs a real process that gets a signal when it prints a line; returns its exit code and what it printed.

    The pipe is small and read byte by byte: a run whose report fills it waits for us, so it cannot end before the signal.
    """
    read, write = os.pipe()
    fcntl.fcntl(write, F_SETPIPE_SZ, 4096)
    process = subprocess.Popen([sys.executable, *command], stderr=write, stdout=write, cwd=Path(__file__).parents[2])
    os.close(write)
    said = b""
    while not said.rsplit(b"\n", 2)[-1].startswith(line.encode()) and (byte := os.read(read, 1)):
        said += byte
    process.send_signal(number)
    with os.fdopen(read, "rb") as rest:
        said += rest.read()
    return process.wait(), said.decode()


@pytest.mark.slow
def test_killed_then_interrupted_then_resumed_is_the_straight_run(tiny_config: Path, tiny_run: Path) -> None:
    """The kills come before the first checkpoint and between two; Ctrl-C ends the process with 130 and no traceback."""
    run = tiny_config.parent / "interrupted"
    command = ["-m", "jaxblock", "train", "--config", str(tiny_config), "--train.out", str(run)]
    command += ["--train.save_every", "20"]
    for line, number, expected in (
        ("step 3/", signal.SIGKILL, -signal.SIGKILL),
        ("step 7/", signal.SIGINT, 130),
        ("step 36/", signal.SIGKILL, -signal.SIGKILL),
    ):
        code, said = _train_until(line, number, *command)
        assert code == expected and "Traceback" not in said, said
    assert main(command[2:]) == 0
    runs.check_same(run, tiny_run)


@pytest.mark.slow
def test_terminal_interrupt_reaches_no_worker_process(tiny_config: Path, tiny_run: Path) -> None:
    """Ctrl-C goes to the whole group of processes: the workers must not die of it with tracebacks."""
    run = tiny_config.parent / "workers"
    command = ["train", "--config", str(tiny_config), "--train.out", str(run), "--train.loader_workers", "2"]
    script = f"import os, sys; os.setpgrp(); sys.argv = ['jaxblock', *{command!r}]\n"
    script += "import signal; from jaxblock.cli import main\n"
    script += "signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGINT)); sys.exit(main())"
    code, said = _train_until("step 7/", signal.SIGUSR1, "-c", script)
    assert code == 130 and "Traceback" not in said, said
    assert main(command) == 0
    runs.check_same(run, tiny_run)


def test_a_finished_run_says_so_and_reads_no_weights_whatever_does_not_change_learning(
    tiny_config: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (tiny_run / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(start, "load_session", None)
    flags = ["--train.log_every", "7", "--train.eval_every", "0", "--train.resume", "must", "--model.remat", "full"]
    flags += ["--decode.temperature", "0.5", "--evaluate.grader", "exact", "--train.fsdp", "2"]
    assert main(["train", "--config", str(tiny_config), *flags]) == 0
    assert "is finished (120 steps); nothing to do" in capsys.readouterr().err
    assert (tiny_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer.lr", "0.5"], "optimizer.lr = 0.01 then, 0.5 now"),
        (["--train.seed", "1"], "train.seed = 0 then, 1 now"),
        (
            ["--train.steps", "130"],
            "train.steps = 120 then, 130 now (the learning rates of the cosine schedule depend on it",
        ),
        (["--method.law", "bernoulli", "--canvas.block", "8"], "canvas.block = 4 then, 8 now; method.law = 'exact"),
        (["--model.d_model", "32"], "model.d_model = 16 then, 32 now"),
        (["--train.resume", "never"], "already holds a run"),
        (["--train.resume", "must", "--train.out", "{new}"], "train.resume is must, but {new} has no whole checkpoint"),
        (["--train.out", "{full}"], "holds no config.yaml, so it is not replaced"),
    ],
)
def test_what_is_no_exact_resume_is_refused(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: Any, flags: list[str], message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("all my work")
    names = {"new": tmp_path / "new", "full": tmp_path / "full"}
    assert main(["train", "--config", str(tiny_config), *(flag.format(**names) for flag in flags)]) == 2
    assert message.format(**names) in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "new").exists()


def test_steps_of_a_constant_schedule_can_be_raised(tiny_config: Path, tmp_path: Path, capsys: Any) -> None:
    def trained(name: str, steps: int) -> int:
        flags = ["--optimizer.schedule", "constant", "--train.out", str(tmp_path / name), "--train.steps", str(steps)]
        flags += ["--train.batch_size", "80"]
        return main(["train", "--config", str(tiny_config), *runs.QUIET, *flags])

    assert trained("run", 12) == trained("run", 17) == trained("straight", 17) == 0
    assert "train.batch_size 80 is more than the 77 training records: every" in capsys.readouterr().err
    runs.check_same(tmp_path / "run", tmp_path / "straight")
    assert trained("run", 16) == 2
    assert "train.steps = 17 then, 16 now (the run has done 17 steps already)" in capsys.readouterr().err


def test_a_run_that_lost_its_checkpoints_does_not_begin_again_silently(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    command = [
        "train",
        "--config",
        str(tiny_config),
        "--train.out",
        str(run),
    ]
    shutil.rmtree(run / "checkpoints" / "100")
    (run / "checkpoints" / "120" / "params" / "_METADATA").unlink()
    before = sorted(run.rglob("*"))
    for message in (" is damaged (", " holds no checkpoint"):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert (
            f"the run cannot go on: {run / 'checkpoints'}" in said
            and message in said
            and "train.resume to restart" in said
        )
        assert sorted(run.rglob("*")) == before
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        before = [path for path in before if "checkpoints" not in path.parts]


def test_a_second_writer_is_refused(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every verb that writes a folder for long names the process that writes it already."""
    new, copy = tmp_path / "new", tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    config = ["--config", str(tiny_config)]
    commands = {
        new: [
            ["prepare", *config, "--data.prepared", str(new)],
            ["train", *config, "--train.out", str(new)],
            ["export", "--checkpoint", str(tiny_run), "--out", str(new)],
        ],
        copy: [["train", *config, "--train.out", str(copy)]],
    }
    for folder, inside in ((new, False), (copy, True)):
        before = sorted(tmp_path.rglob("*"))
        with only_writer(folder, inside=inside):
            for command in commands[folder]:
                assert main(command) == 2
                assert f"{folder} is being written by process {os.getpid()} on" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before


def test_other_data_or_another_start_are_refused(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of records has changed; a run killed before its first checkpoint begins again, but only as the same run."""
    lines = (tiny_config.parent / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[::-1]))
    command = ["--config", str(tiny_config), "--data.prepared", str(tmp_path / "prepared")]
    other = ["--data.train", str(tmp_path / "train.jsonl"), "--data.tokenizer", str(tiny_run / "tokenizer")]
    assert main(["prepare", *command, *other]) == 0
    assert main(["train", *command]) == 2
    assert "was trained on other data" in capsys.readouterr().err
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "had_checkpoint.json"))
    command = ["train", "--config", str(tiny_config), "--train.out", str(run)]
    assert main([*command, "--model.init_from", str(tiny_run)]) == 2
    assert f"model.init_from = None then, '{tiny_run}' now" in capsys.readouterr().err
    assert main(["decode", "--checkpoint", str(run), "1+1?"]) == 2
    assert "has no whole checkpoint yet" in capsys.readouterr().err

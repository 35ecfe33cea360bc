"""A run that is stopped, killed or started again ends as the run that was left alone."""

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
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.io.locks import only_writer
from jaxblock.training import start
from jaxblock.training.checkpoints.reader import CheckpointReader
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


def _begun(tiny_run: Path, run: Path) -> Path:
    """Copies a run as a kill before its first checkpoint leaves it."""
    return shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "had_checkpoint.json", ".lock"))


def test_interrupted_before_and_after_a_checkpoint_then_resumed_is_the_straight_run(
    tiny_config, tiny_run, tmp_path, ran, signalled
):
    run = _begun(tiny_run, tmp_path / "run")
    command = f"train --config {tiny_config} --train.out {run}"
    signalled(3)
    said = ran(command, 130).err
    assert "has no whole checkpoint: beginning again" in said
    assert "To go on, run the same command again" in said and str(run) in said
    assert runs.rows(run) == runs.rows(tiny_run)[:3]
    # From its checkpoint of step 100, with what a kill in the middle of a write leaves of the metrics.
    shutil.rmtree(run)
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns(".lock"))
    shutil.rmtree(run / "checkpoints" / "120")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "ki')
    signalled(107)
    ran(command, 130)
    assert [row["step"] for row in runs.rows(run)] == list(range(1, 108))
    said = ran(f"{command} --train.resume must").err
    runs.check_same(run, tiny_run)
    assert (run / "samples.jsonl").read_bytes() == (tiny_run / "samples.jsonl").read_bytes()
    assert said.count("\n  problem ") == 2 and "\n  problem 1, " in said  # beneath the last evaluation


@pytest.mark.slow
def test_terminal_interrupt_reaches_no_worker_process(tiny_config, tiny_run):
    """Ctrl-C goes to the whole group of processes: the workers must not die of it with tracebacks.

    The pipe is small and read byte by byte: a run whose report fills it waits for us, so it cannot end before the signal.
    """
    run = tiny_config.parent / "workers"
    command = ["train", "--config", str(tiny_config), "--train.out", str(run), "--train.loader_workers", "2"]
    script = f"import os, sys; os.setpgrp(); sys.argv = ['jaxblock', *{command!r}]\n"
    script += "import signal; from jaxblock.cli import main\n"
    script += "signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGINT)); sys.exit(main())"
    read, write = os.pipe()
    fcntl.fcntl(write, F_SETPIPE_SZ, 4096)
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", script], stderr=write, stdout=write, cwd=root)
    os.close(write)
    said = b""
    while not said.rsplit(b"\n", 2)[-1].startswith(b"step 7/") and (byte := os.read(read, 1)):
        said += byte
    process.send_signal(signal.SIGUSR1)
    with os.fdopen(read, "rb") as rest:
        said += rest.read()
    assert process.wait() == 130 and b"Traceback" not in said, said
    assert main(command) == 0
    runs.check_same(run, tiny_run)


def test_a_finished_run_says_so_and_reads_no_weights_whatever_does_not_change_learning(
    tiny_config, run_copy, ran, monkeypatch
):
    before = (run_copy / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(start, "load_session", None)
    flags = "--train.log_every 7 --train.eval_every 0 --train.resume must --model.remat full"
    flags += " --decode.temperature 0.5 --evaluate.grader exact --train.fsdp 2"
    assert (
        "is finished (120 steps); nothing to do"
        in ran(f"train --config {tiny_config} --train.out {run_copy} {flags}").err
    )
    assert (run_copy / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optimizer.lr 0.5", "optimizer.lr = 0.01 then, 0.5 now"),
        ("--train.seed 1", "train.seed = 0 then, 1 now"),
        ("--train.steps 130", "120 then, 130 now (the learning rates of the cosine schedule depend on it"),
        ("--method.law bernoulli --canvas.block 8", "canvas.block = 4 then, 8 now; method.law = 'exact"),
        ("--model.d_model 32", "model.d_model = 16 then, 32 now"),
        ("--train.resume never", "already holds a run"),
        ("--train.resume must --train.out {new}", "train.resume is must, but {new} has no whole checkpoint"),
        ("--train.out {full}", "holds no config.yaml, so it is not replaced"),
        ("--train.out {begun} --model.init_from {run}", "model.init_from = None then, '{run}' now"),
    ],
)
def test_what_is_no_exact_resume_is_refused(tiny_config, run_copy, tmp_path, ran, flags, message):
    names = {"new": tmp_path / "new", "full": tmp_path / "full", "run": run_copy}
    names["full"].mkdir()
    (names["full"] / "thesis.tex").write_text("all my work")
    names["begun"] = _begun(run_copy, tmp_path / "begun")
    command = f"train --config {tiny_config} --train.out {run_copy} {flags.format(**names)}"
    assert message.format(**names) in ran(command, 2).err
    assert [entry.name for entry in names["full"].iterdir()] == ["thesis.tex"] and not names["new"].exists()


def test_a_checkpoint_of_an_earlier_version_has_later_fields_at_their_defaults(tiny_config, run_copy, ran, monkeypatch):
    def earlier(self, step, read=CheckpointReader.meta):
        saved = read(self, step)
        del saved["config"]["method"]["rate_floor"]
        return saved

    monkeypatch.setattr(CheckpointReader, "meta", earlier)
    command = f"train --config {tiny_config} --train.out {run_copy}"
    assert "nothing to do" in ran(command).err
    said = ran(f"{command} --method.rate_floor 0.3", 2).err
    assert "method.rate_floor = 0.0 then, 0.3 now" in said


def test_a_run_that_lost_its_checkpoints_does_not_begin_again_silently(tiny_config, run_copy, ran):
    folder = run_copy / "checkpoints"
    shutil.rmtree(folder / "100")
    (folder / "120" / "params" / "_METADATA").unlink()
    for message in (" is damaged (", " holds no checkpoint"):
        before = sorted(run_copy.rglob("*"))
        said = ran(f"train --config {tiny_config} --train.out {run_copy}", 2).err
        assert f"the run cannot go on: {folder}" in said and message in said and "train.resume to restart" in said
        assert sorted(run_copy.rglob("*")) == before
        shutil.rmtree(folder, ignore_errors=True)


def test_a_second_writer_is_refused(tiny_config, tiny_run, run_copy, tmp_path, ran):
    """Every verb that writes a folder for long names the process that writes it already."""
    new, config = tmp_path / "new", f"--config {tiny_config}"
    commands = {
        f"prepare {config} --data.prepared {new}": new,
        f"train {config} --train.out {new}": new,
        f"export --checkpoint {tiny_run} --out {new}": new,
        f"train {config} --train.out {run_copy}": run_copy,
    }
    before = sorted(tmp_path.rglob("*"))
    for command, folder in commands.items():
        with only_writer(folder, inside=folder == run_copy):
            assert f"{folder} is being written by process {os.getpid()} on" in ran(command, 2).err
    assert sorted(tmp_path.rglob("*")) == before


def test_other_data_are_refused_and_a_run_without_a_checkpoint_is_no_model(tiny_config, tiny_run, tmp_path, ran):
    lines = (tiny_config.parent / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[::-1]))
    command = f"--config {tiny_config} --data.prepared {tmp_path / 'prepared'}"
    ran(f"prepare {command} --data.train {tmp_path / 'train.jsonl'} --data.tokenizer {tiny_run / 'tokenizer'}")
    assert "was trained on other data" in ran(f"train {command}", 2).err
    run = _begun(tiny_run, tmp_path / "run")
    assert "has no whole checkpoint yet" in ran(f"decode --checkpoint {run} 1+1?", 2).err


def test_a_run_reads_files_by_weights_and_keeps_them(tiny_config, tmp_path, ran):
    """The first file, a tenth of the problems, gives nine rows of ten; weights need no other prepared folder."""
    lines = (tiny_config.parent / "train.jsonl").read_text().splitlines(keepends=True)
    files = [tmp_path / "few.jsonl", tmp_path / "many.jsonl"]
    for file, some in zip(files, (lines[::10], [line for at, line in enumerate(lines) if at % 10]), strict=True):
        file.write_text("".join(some))
    data = f"--config {tiny_config} --data.prepared {tmp_path / 'prepared'} --data.train {files[0]} {files[1]}"
    ran(f"prepare {data} --data.validation_records 4")
    flags = (
        f"{data} --data.validation_records 4 --train.out {tmp_path / 'run'} --train.eval_every 0 --train.save_every 2"
    )
    kept = [entry["kept"] for entry in open_prepared(tmp_path / "prepared").manifest.splits["train"]["files"]]
    told = ran(f"train {flags} --train.steps 2 --optimizer.schedule constant --data.weights 0.9 0.1")
    assert (
        f"rows: 0.9 from {files[0]} ({kept[0]} records), 0.1 from {files[1]} ({kept[1]} records)" in told.out + told.err
    )
    again = f"train {flags} --train.steps 4 --optimizer.schedule constant"
    assert "data.weights = [0.9, 0.1] then, [0.5, 0.5] now" in ran(f"{again} --data.weights 0.5 0.5", 2).err
    ran(f"{again} --data.weights 0.9 0.1")
    swapped = flags.replace(f"{files[0]} {files[1]}", f"{files[1]} {files[0]}")
    assert "others or in another order" in ran(f"train {swapped} --data.weights 0.9 0.1", 2).err

"""A run that is stopped, killed or started again ends as the run that was left alone."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from jaxblock.cli import main
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.errors import UserError
from jaxblock.fit import compile
from jaxblock.io.locks import only_writer
from jaxblock.training import start
from jaxblock.training.observe.window import StepWindow
from tests import runs


def _begun(tiny_run: Path, run: Path) -> Path:
    """Copies a run as a kill before its first checkpoint leaves it."""
    return shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "had_checkpoint.json", ".lock"))


@pytest.mark.slow
def test_interrupted_before_and_after_a_checkpoint_then_resumed_is_the_straight_run(
    tiny_config, tiny_run, tmp_path, ran, monkeypatch
):
    """This process sends itself Ctrl-C when the run has dispatched a step."""
    due, add = [3, 107], StepWindow.add

    def signalled(window: StepWindow, step: int, *rest: object) -> None:
        add(window, step, *rest)
        if step in due:
            due.remove(step)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StepWindow, "add", signalled)
    run = _begun(tiny_run, tmp_path / "run")
    command = f"train --config {tiny_config} --train.out {run}"
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
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
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
    said = ran(f"train --config {tiny_config} --train.out {run_copy} {flags}").err
    assert "is finished (120 steps); nothing to do" in said
    assert (run_copy / "metrics.jsonl").read_bytes() == before


# Flags, and what the run is refused with; {names} are folders: new is free, full holds a text, run is the finished run, begun
# the same before its first checkpoint, lost without the checkpoints that it had.
REFUSED = """
--train.out {run} --optimizer.lr 0.5 | optimizer.lr = 0.01 then, 0.5 now
--train.out {run} --train.seed 1 | train.seed = 0 then, 1 now
--train.out {run} --train.steps 130 | 120 then, 130 now (the learning rates of the cosine schedule depend on it
--train.out {run} --method.law bernoulli --canvas.block 8 | canvas.block = 4 then, 8 now; method.law = 'exact
--train.out {run} --model.d_model 32 | model.d_model = 16 then, 32 now
--train.out {run} --train.resume never | already holds a run
--train.out {begun} --model.init_from {run} | model.init_from = None then, '{run}' now
--train.out {lost} | the run cannot go on: {lost}/checkpoints holds no checkpoint
--train.out {new} --train.resume must | train.resume is must, but {new} has no whole checkpoint
--train.out {full} | holds no config.yaml, so it is not replaced
--train.out {new} --train.batch_size 12 | train.batch_size 12 does not split over 8 devices
--train.out {new} --train.fsdp 3 | train.fsdp 3
--train.out {new} --train.fsdp 8 --model.d_model 20 | does not divide by 8
--train.out {new} --profile 0 3 | train.profile is 0 3: give the first and the last step
--train.out {new} --profile 5 4 | train.profile is 5 4: give the first and the last step
--train.out {new} --profile 5 121 | train.profile is 5 121: give the first and the last step
--train.out {new} --train.samples 9 | 9, but evaluations decode 8 problems: samples are taken from these, so raise train.eval_problems
--train.out {new} --model.init_step 100 | model.init_from, the run whose checkpoint it is, is not set
--train.out {new} --lora.rank 2 | adapters need trained weights
--train.out {new} --lora.rank 2 --model.init_from {run} --lora.targets qkv | lora.targets: 'qkv' matches no matrix
--train.out {new} --lora.rank 2 --model.init_from {run} --lora.dropout 1.0 | lora.dropout is 1.0
--train.out {new} --model.init_from {run} --model.quantize int8 | int8 weights cannot be trained
"""


@pytest.mark.parametrize("case", REFUSED.strip().split("\n"))
def test_what_is_no_exact_resume_or_makes_no_sense_is_refused(tiny_config, run_copy, tmp_path, ran, case):
    """16 embedding columns over 8 devices are fine, 2 x 24 = 48 layers' columns too; 20 columns are not."""
    names = {name: tmp_path / name for name in ("new", "full", "lost")} | {"run": run_copy}
    names["full"].mkdir()
    (names["full"] / "thesis.tex").write_text("all my work")
    names["begun"] = _begun(run_copy, tmp_path / "begun")
    shutil.copytree(run_copy, names["lost"], ignore=shutil.ignore_patterns("checkpoints"))
    flags, message = case.format(**names).split(" | ")
    with runs.checkpoints_closed():
        assert message in ran(f"train --config {tiny_config} {flags}", 2).err
    assert [entry.name for entry in names["full"].iterdir()] == ["thesis.tex"] and not names["new"].exists()


def test_a_run_that_cannot_be_loaded_closes_its_checkpoints(tiny_config, run_copy, tmp_path, ran, monkeypatch):
    shutil.rmtree(run_copy / "checkpoints" / "120")
    failing = Mock(side_effect=UserError("it cannot go on"))
    monkeypatch.setattr(compile, "compile_step", lambda *_: (None, None))
    for module, name, run in (
        (compile, "compile_step", run_copy),
        (start.weights, "resumed_base", run_copy),
        (start, "_validation_records", run_copy),
        (start, "_validation_records", tmp_path / "new"),
    ):
        with monkeypatch.context() as patch, runs.checkpoints_closed() as opened:
            patch.setattr(module, name, failing)
            said = ran(f"train --config {tiny_config} --train.out {run}", 2).err
            assert "it cannot go on" in said and opened, name


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


def test_a_run_without_one_of_its_files_is_still_known_as_one(tiny_config, run_copy, ran):
    """And a file among its checkpoints is no checkpoint."""
    (run_copy / "checkpoints" / "130").touch()
    ran(f"decode --checkpoint {run_copy} 1+1?")
    for name in ("model.json", "config.yaml"):
        moved = (run_copy / name).rename(run_copy / "aside")
        for command in (f"decode --checkpoint {run_copy} 1+1?", f"train --config {tiny_config} --train.out {run_copy}"):
            assert f"is the folder of a run, but its {name} is missing: put it back" in ran(command, 2).err
        moved.rename(run_copy / name)


def test_what_nothing_comes_of_is_said_before_anything_is_read(tiny_config, run_copy, tmp_path, ran):
    without = f"--config {tiny_config} --data.prepared {tmp_path / 'prepared'}"
    ran(f"prepare {without} --data.validation_records 0")
    refused = ran(f"train {without} --train.out {tmp_path / 'new'} --train.keep_best nelbo", 2).err
    assert "train.keep_best is nelbo, but the data in" in refused and "hold no validation records" in refused
    said = ran(f"train --config {tiny_config} --train.out {run_copy} --train.keep_steps 5 100 120")
    assert "train.keep_steps: the run is past step 5, of which it has no checkpoint" in said.err + said.out


@pytest.mark.slow
def test_a_run_reads_files_by_weights_and_keeps_them(tiny_config, tmp_path, ran):
    """The first file, a tenth of the problems, gives nine rows of ten; weights need no other prepared folder."""
    lines = (tiny_config.parent / "train.jsonl").read_text().splitlines(keepends=True)
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    few.write_text("".join(lines[::10]))
    many.write_text("".join(line for at, line in enumerate(lines) if at % 10))
    data = f"--config {tiny_config} --data.prepared {tmp_path / 'prepared'} --data.validation_records 4"
    ran(f"prepare {data} --data.train {few} {many}")
    kept = [entry["kept"] for entry in open_prepared(tmp_path / "prepared").manifest.splits["train"]["files"]]
    train = f"train {data} --train.out {tmp_path / 'run'} --train.eval_every 0 --train.save_every 2 "
    train += "--optimizer.schedule constant --data.train"
    told = ran(f"{train} {few} {many} --data.weights 0.9 0.1 --train.steps 2")
    wanted = f"rows: 0.9 from {few} ({kept[0]} records), 0.1 from {many} ({kept[1]} records)"
    assert wanted in told.out + told.err
    again = f"{train} {few} {many} --train.steps 4 --data.weights"
    assert "data.weights = [0.9, 0.1] then, [0.5, 0.5] now" in ran(f"{again} 0.5 0.5", 2).err
    ran(f"{again} 0.9 0.1")
    assert "others or in another order" in ran(f"{train} {many} {few} --data.weights 0.9 0.1", 2).err

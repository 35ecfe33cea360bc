"""Tests the verbs, as people use and misuse them."""

from __future__ import annotations

import ast
import errno
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from jaxblock import cli
from jaxblock.cli import main
from jaxblock.commands import train
from jaxblock.config.config import Config
from jaxblock.errors import UserError
from jaxblock.huggingface import companions
from jaxblock.training.checkpoints import run_folder

ROOT = Path(__file__).parents[1]


def _flags(options: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields every flag of a verb with its default and the sentence that stands below its field in the source."""
    kind = options if isinstance(options, type) else type(options)
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    said = {
        before.target.id: " ".join(after.value.value.split())
        for before, after in zip(node.body, node.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(after, ast.Expr)
        if isinstance(after.value, ast.Constant)
    }
    for field in fields(kind):
        value = getattr(options, field.name, MISSING)
        if value is MISSING and field.default_factory is not MISSING:
            value = field.default_factory()
        if is_dataclass(value):
            yield from _flags(value, f"{prefix}{field.name}.")
        elif field.name != "prompts":
            yield f"--{prefix}{field.name}", value, said[field.name]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_shows_every_field_with_default_and_sentence(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help-all"])
    assert ended.value.code == 0
    # Boxes and line breaks out; words that a line break cut stay cut, so spaces go as well.
    shown = re.sub(r"[\s│╭╮╰╯─'\"]", "", capsys.readouterr().out)
    for flag, default, sentence in _flags(cli.VERBS[verb].options):
        assert flag in shown, flag
        after = shown.split(flag, 1)[1]
        if isinstance(default, int | float | str) and not isinstance(default, bool) and default != "":
            assert f"default:{default}".replace(" ", "") in after, (flag, default)
        elif default is MISSING:
            assert "(required)" in after
        assert re.sub(r"[\s'\"]", "", sentence) in shown, sentence


@pytest.mark.parametrize("verb", cli.VERBS)
def test_short_help_shows_the_common_fields(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    told = capsys.readouterr().out
    assert len(told.splitlines()) <= 100
    kind = cli.VERBS[verb].options
    sections = {field.name for field in fields(kind)} & {field.name for field in fields(Config)}
    common = {f"{name}.{field}" for name in sections for field in getattr(Config(), name).common(verb)}
    shown = set(re.findall(r"(?m)^[^-\w]*--(\w+(?:\.\w+)?)", told)) - {"help", "checkpoint"}
    assert common == {name for name in shown if "." in name}
    assert {field.name for field in fields(kind)} - sections - {"checkpoint", "prompts"} <= shown
    assert ("--help-all" in told) == bool(sections)


def test_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in cli.VERBS)
    assert main([]) == 2
    assert main(["--version"]) == 0


def test_the_module_is_the_script_and_help_does_not_wait_for_jax() -> None:
    code = "import runpy, sys, jaxblock.config.checks, jaxblock.config.yaml; sys.argv = ['', '--help']\n"
    code += "try: runpy.run_module('jaxblock', run_name='__main__')\n"
    code += "except SystemExit as ended: sys.exit(ended.code or 'jax' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (told.returncode, told.stdout.split()[:2]) == (0, ["usage:", "jaxblock"])
    assert 'jaxblock = "jaxblock.cli:main"' in (ROOT / "pyproject.toml").read_text()


# Commands, and what the one line says; {names} are places: new is free, file and folder hold something.
MISTAKES = """
trian | unknown verb 'trian'; did you mean train?
xyz | verbs: prepare, inspect, train
train --config nowhere.yaml | cannot read nowhere.yaml
train --config {config} --config b.yaml | --config is given 2 times ({config}, b.yaml)
train {config} --train.steps 3 | give a file of settings as --config {config}
evaluate --checkpoint {run} --out={new} run.yml | run.yml has no flag before it
decode --checkpoint {run} 1+1? {config} | give a file of settings as --config {config}
evaluate {run} --out {new} | give --checkpoint {run}
train --checkpoint {run} | train has no --checkpoint: a run goes on from its own folder
decode --checkpoint {config} 1+1? | {config} is a file, and a checkpoint is a folder
decode --checkpoint {prepared} 1+1? | {prepared} holds prepared data, not a checkpoint
decode --checkpoint tests/typo 1+1? | tests/typo: no such folder
decode --checkpoint runs/typo 1+1? | runs/typo: no such folder
train --config=a.yaml --train.steps 3 --config {config} | 2 times (a.yaml, {config})
decode --checkpoint {run} --checkpoint={new} 1+1? | --checkpoint is given 2 times
train --config {config} --canvas.block 3 | canvas.block 3 does not divide canvas.response_len 16
train --config {config} --data.prepared {new} | {new} holds no prepared data
train --config {config} --train.out {new} --canvas.response_len 8 | prepared with 16
train --config {config} --train.out {new} --decode.block 3 | decode.block 3 does not divide
train --config {config} --train.out {new} --decode.response_len 9000 | the model was made for 4096
train --config {config} --train.out /proc/run | /proc/run
train --config {config} --train.out {file}/run | a file stands where a folder is needed
train --config {config} --train.out {new} --model.init_from {file} | {file}
inspect --config {config} --records 9999 | records: train has records 0 to
inspect --config {config} --steps 0 | at least 1 of `steps`
inspect --config {config} --html {file} | {file} exists already
decode --checkpoint {new} 1+1? | {new}: no such folder
decode --checkpoint {run} --file {new} | cannot read {new}
decode --checkpoint {run} --file {latin} | {latin}:2: not UTF-8 text
decode --checkpoint {run} --file {jsonl} | {jsonl}:2: no field 'question' (did you mean 'quest'?); set data.prompt_field to one of 'quest'
decode --checkpoint {run} 1+1? --out {file} | {file} exists already
decode --checkpoint {run} 1+1? --out /proc/x/y | /proc/x
decode --checkpoint {run} 1+1? --watch --out {new} | leave out either
decode --checkpoint {run} 'a <|mdm_mask|>' | prompt 1: the user's text contains the special token
decode --checkpoint {run} 1+1? {long} | prompt 2 has
decode --checkpoint {run} 1+1? --decode.block 5 | set block to 4 or response_len to 20
evaluate --checkpoint {run} --out {folder} | so it is not replaced
evaluate --checkpoint {run} --out /proc/x/y | /proc/x
evaluate --checkpoint {run} --out {new} --evaluate.compare {file} | {file}:1: not JSON
evaluate --checkpoint {run} --out {new} --canvas.prompt_len 8 | canvas.prompt_len is 8
evaluate --checkpoint {run} --out {new} --data.prepared {folder} | holds no prepared data
export --checkpoint {run} --out {folder} | so it is not replaced
export --checkpoint {run} --out {run} | so it is not replaced
export --checkpoint {run} --out /proc/x/y | /proc/x
export --checkpoint {folder} --out {new} | no config.json
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_mistakes_get_one_clear_line(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("all my work")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "latin").write_bytes(b"1+1?\ncaf\xe9?\n")
    (tmp_path / "q.jsonl").write_text('{"question": "1+1?"}\n{"quest": "2+2?"}\n')
    places = {name: tmp_path / name for name in ("new", "folder", "file", "latin")}
    names = {**places, "jsonl": tmp_path / "q.jsonl", "config": tiny_config, "run": tiny_run, "long": "1" * 5000}
    names["prepared"] = tiny_config.parent / "prepared"
    command, message = mistake.split(" | ")
    assert main(shlex.split(command.format(**names))) == 2
    told = capsys.readouterr()
    assert message.format(**names) in told.err
    assert "Traceback" not in told.err and told.out == ""
    assert told.err.rstrip().splitlines()[-1].startswith("jaxblock: ")
    # Nothing that was there is touched, nothing half-made is left.
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder", "latin", "q.jsonl"]
    assert (tmp_path / "file").read_text() == "precious"
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.step", "3"], "--train.steps"),
        (["--train.steps", "many"], "invalid literal for int"),
        (["--method.law", "exact"], "exact_count"),
        (["--optimizer.lr"], "--optimizer.lr"),
    ],
)
def test_mistyped_flags_are_explained(
    tiny_config: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(tiny_config), *flags])
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert message in told.out + told.err


def test_traceback_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="nowhere.yaml"):
        main(["train", "--config", "nowhere.yaml", "--traceback"])


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = cli.VERBS["inspect"]._replace(run=lambda options, config: 1 // 0)
    monkeypatch.setitem(cli.VERBS, "inspect", broken)
    assert main(["inspect"]) == 1
    told = capsys.readouterr().err
    assert "ZeroDivisionError" in told and "this is a bug" in told


def test_flags_come_before_the_file_and_the_file_before_defaults(tiny_config: Path) -> None:
    options = cli.parse("train", ["--config", str(tiny_config), "--train.seed", "5", "--model.n-layers", "1"])
    assert (options.train.seed, options.model.n_layers) == (5, 1)
    assert (options.train.steps, options.optimizer.lr) == (120, 0.01)
    assert options.optimizer.b1 == 0.9


def test_flags_that_training_does_not_read_are_named(tiny_config: Path, tmp_path: Path) -> None:
    def named(*flags: str) -> str:
        return " ".join(train._unused_evaluation(cli.parse("train", flags)))

    (tmp_path / "shared.yaml").write_text("evaluate: {problems: 5, split: validation, compare: problems.jsonl}")
    file = ("--config", str(tmp_path / "shared.yaml"))
    assert named(*file) == named(*file, "--evaluate.grader", "exact", "--evaluate.nelbo_samples", "3") == ""
    assert "--evaluate.problems does not" in named(*file, "--evaluate.problems", "6", "--evaluate.split", "validation")
    assert named("--config", str(tiny_config), "--evaluate.nelbo_rows", "8") == ""
    told = named("--evaluate.problems", "6", "--evaluate.no-nelbo")
    assert "--evaluate.problems does not" in told and "--evaluate.nelbo does not" in told and "split" not in told


def test_a_checkpoint_brings_its_own_settings(tiny_run: Path) -> None:
    options = cli.parse("decode", ["--checkpoint", str(tiny_run), "--decode.temperature", "0.5", "1+1?", "2+2?"])
    assert options.prompts == ("1+1?", "2+2?")
    assert (options.canvas.block, options.decode.batch_size, options.decode.temperature) == (4, 4, 0.5)


def test_a_closed_pipe_is_no_error_and_nothing_heavy_is_imported(tiny_run: Path) -> None:
    """Pictures, statistics and the kernels of other machines take as long to import as all the rest of training and decoding."""
    heavy = ("matplotlib", "scipy.stats", "jax.experimental.pallas", "transformers", "torch")
    code = f"import sys; from jaxblock.cli import main; ended = main(['decode', '--checkpoint', {str(tiny_run)!r}, '1+1?'])\n"
    code += "import jaxblock.build, jaxblock.fit.compile, jaxblock.training.loop\n"
    code += f"sys.exit([name for name in {heavy} if name in sys.modules] or ended)"
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, b"")


def _full(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_nothing_that_looks_whole(
    tiny_config: Path,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lets the disk be full at the first write inside each folder that a verb makes."""
    run, config = ["--checkpoint", str(tiny_run)], ["--config", str(tiny_config)]
    out = tmp_path / "out"
    verbs = {
        "prepare": [*config, "--data.prepared", str(out)],
        "train": [*config, "--train.out", str(out)],
        "decode": [*run, "1+1?", "--out", str(out)],
        "evaluate": [*run, "--out", str(out), "--evaluate.problems", "4"],
        "export": [*run, "--out", str(out)],
    }
    places = {"train": (run_folder, "copy_files"), "decode": (os, "fsync"), "export": (companions, "copy_files")}
    for verb, arguments in verbs.items():
        with monkeypatch.context() as patch:
            if verb in places:
                patch.setattr(*places[verb], _full)
            elif verb == "prepare":
                from jaxblock.data.store import prepare

                patch.setattr(prepare, "write_records", _full)
            else:
                real = Path.write_text
                patch.setattr(
                    Path,
                    "write_text",
                    lambda at, *a, real=real, **k: _full() if "problems" in at.name else real(at, *a, **k),
                )
            assert main([verb, *arguments]) == 2, verb
        assert "the disk is full" in capsys.readouterr().err, verb
        assert list(tmp_path.iterdir()) == [], verb


def test_a_full_disk_under_a_checkpoint_keeps_the_one_before(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from orbax.checkpoint import AsyncCheckpointer

    run = tmp_path / "run"
    command = ["train", "--config", str(tiny_config), "--train.out", str(run), "--train.save_every", "4"]
    command += ["--train.eval_every", "0", "--train.steps", "10"]
    real = AsyncCheckpointer.save

    def save(orbax: AsyncCheckpointer, folder: Any, *arguments: Any, **options: Any) -> None:
        if int(Path(folder).name) > 4:
            raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")
        real(orbax, folder, *arguments, **options)

    monkeypatch.setattr(AsyncCheckpointer, "save", save)
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "step 8: no checkpoint was written" in told and "the disk is full; the last whole one is of step 4" in told
    assert "step 10/10" in told and "the last one, could not be saved" in told
    assert [entry.name for entry in (run / "checkpoints").iterdir()] == ["4"]

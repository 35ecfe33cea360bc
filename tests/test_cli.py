"""Tests the verbs, as people use and misuse them."""

import errno
import gzip
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from orbax.checkpoint import AsyncCheckpointer

from jaxblock import cli, loading
from jaxblock.cli import main
from jaxblock.commands.unused import unused_flags
from jaxblock.config.config import Config
from jaxblock.data.store import prepare
from jaxblock.data.store.manifest import read_manifest
from jaxblock.errors import UserError
from jaxblock.evaluation import problems
from jaxblock.huggingface import companions
from jaxblock.training.checkpoints import run_folder

ROOT = Path(__file__).parents[1]
POSITIONAL = ("prompts", "preset", "run", "action", "target")
"""The fields that are given without a flag."""


def _flags(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields every flag of a verb with its default and the sentence that stands below its field in the source."""
    said = dict(re.findall(r'(?ms)^    (\w+): .*?\n    """(.+?)"""$', inspect.getsource(kind)))
    for field in fields(kind):
        if is_dataclass(field.default_factory):
            yield from _flags(field.default_factory, f"{prefix}{field.name}.")
        elif field.name not in POSITIONAL:
            yield f"--{prefix}{field.name}", field.default, said[field.name]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_shows_every_field_with_default_and_sentence_and_the_short_one_those_that_are_common(verb, capsys):
    def told(flag: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            main([verb, flag])
        return capsys.readouterr().out

    # Boxes and line breaks out; words that a line break cut stay cut, so spaces go as well.
    shown = re.sub(r"[\s│╭╮╰╯─'\"]", "", told("--help-all"))
    for flag, default, sentence in _flags(cli.VERBS[verb].options):
        after = shown.split(flag, 1)[1]
        if isinstance(default, int | float | str) and not isinstance(default, bool) and default != "":
            assert f"default:{default}".replace(" ", "") in after, (flag, default)
        assert default is not MISSING or "(required)" in after
        assert re.sub(r"[\s'\"]", "", sentence) in shown, sentence
    short = told("--help")
    assert len(short.splitlines()) <= 100
    names = {field.name for field in fields(cli.VERBS[verb].options)}
    sections = names & {field.name for field in fields(Config)}
    common = {f"{name}.{field}" for name in sections for field in getattr(Config(), name).common(verb)}
    listed = set(re.findall(r"(?m)^[^-\w]*--(\w+(?:\.\w+)?)", short)) - {"help", "checkpoint"}
    assert common == {name for name in listed if "." in name}
    assert names - sections - {"checkpoint", *POSITIONAL} <= listed and ("--help-all" in short) == bool(sections)


def test_overview_names_every_verb_and_does_not_wait_for_jax(ran):
    code = "import runpy, sys, jaxblock.config.checks, jaxblock.config.yaml; sys.argv = ['', '--help']\n"
    code += "try: runpy.run_module('jaxblock', run_name='__main__')\n"
    code += "except SystemExit as ended: sys.exit(ended.code or 'jax' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (told.returncode, told.stdout.split()[:2]) == (0, ["usage:", "jaxblock"])
    assert all(f"\n  {verb} " in told.stdout for verb in cli.VERBS)
    ran("", 2), ran("--version")


# Commands, and what the one line says, after || before weights are read; {names} are places: new is free, file and folder hold
# something.
MISTAKES = """
trian | unknown verb 'trian'; did you mean train?
xyz | verbs: prepare, inspect, train
train --config nowhere.yaml | cannot read nowhere.yaml
train --train.sample-packing | rows are not packed here
train --packing=true | rows are not packed here
train --config {config} --config b.yaml | --config is given twice ({config}, b.yaml)
prepare --data.train a.jsonl --data.train=b.jsonl | --data.train is given twice (a.jsonl, b.jsonl)
prepare --data.exclude_types GSM --data.exclude-types MATH | --data.exclude-types is given twice (GSM, MATH)
train {config} --train.steps 3 | give a file of settings as --config {config}
evaluate --checkpoint {run} --out={new} run.yml | run.yml has no flag before it
decode --checkpoint {run} 1+1? {config} | give a file of settings as --config {config}
evaluate {run} --out {new} | give --checkpoint {run}
train --checkpoint {run} | train has no --checkpoint: a run goes on from its own folder
decode --checkpoint {config} 1+1? | {config} is a file, and a checkpoint is a folder
decode --checkpoint {prepared} 1+1? | {prepared} holds prepared data, not a checkpoint
decode --checkpoint tests/typo 1+1? | tests/typo: no such folder
decode --checkpoint {run} --checkpoint={new} 1+1? | --checkpoint is given twice
train --config {config} --canvas.block 3 | canvas.block 3 does not divide canvas.response_len 16
train --config {config} --data.prepared {new} | {new} holds no prepared data
train --config {config} --train.out {new} --canvas.response_len 8 | prepared with 16
train --config {config} --train.out {new} --decode.response_len 9000 | the model was made for 4096
train --config {config} --train.out /proc/run | /proc/run
train --config {config} --train.out {file}/run | a file stands where a folder is needed
train --config {config} --train.out {new} --model.init_from {file} | {file}
inspect --config {config} --records 9999 | records: train has records 0 to
inspect --config {config} --steps 0 | at least 1 of `steps`
inspect --config {config} --html {file} | {file} exists already
decode --checkpoint {new} 1+1? | {new}: no such folder
decode --checkpoint {run} --file {new} || cannot read {new}
decode --checkpoint {run} --file {latin}.gz || {latin}.gz:2: not UTF-8 text
decode --checkpoint {run} --file {latin} || {latin}:2: not UTF-8 text
decode --checkpoint {run} --file {jsonl} || {jsonl}:2: no field 'question' (did you mean 'quest'?); set data.prompt_field to one of 'quest'
decode --checkpoint {run} 1+1? --out {file} | {file} exists already
decode --checkpoint {run} 1+1? --file {jsonl} | leave out one of the two
decode --checkpoint {run} 1+1? --watch --out {new} | leave out either
decode --checkpoint {run} 1+1? --watch --html {new} | leave out either --watch or --html
decode --checkpoint {run} 1+1? --html {file} | {file} exists already
decode --checkpoint {run} 1+1? --html {new} --out {new} | write the page to another file
decode --checkpoint {run} 1+1? --beside {run} | --beside has no effect without --html
decode --checkpoint {run} 1+1? --html {new} --beside_step 100 | --beside_step has no effect without --beside
decode --checkpoint {run} 1+1? --html {new} --beside {run} || name another one
decode --checkpoint {run} 1+1? --html {new} --beside {folder} || {folder}: no config.json
decode --checkpoint {run} 1+1? --html {new} --candidates 0 | candidates is 0
decode --checkpoint {run} 'a <|mdm_mask|>' | prompt 1: the user's text contains the special token
decode --checkpoint {run} 1+1? {long} | prompt 2 has
decode --checkpoint {run} 1+1? --decode.block 5 | set block to 4 or response_len to 20
report {folder} | {folder} is not the folder of a training run
report {run} --out {file} | {file} exists already
report {run} --out {new} --evaluations {folder} | {folder} holds no summary.json
evaluate --checkpoint {run} --out {folder} | so it is not replaced
evaluate --checkpoint {run} --out {new} --evaluate.compare {file} || {file}:1: not JSON
evaluate --checkpoint {run} --out {new} --data.prepared {folder} || {folder} holds no prepared data
evaluate --checkpoint {run} --out {new} --canvas.prompt_len 8 || canvas.prompt_len is 8
export --checkpoint {run} --out {run} || so it is not replaced
export --checkpoint {run} --out /proc/x/y || /proc/x
export --checkpoint {folder} --out {new} | no config.json
export --checkpoint {run} --out '' | --out is empty
prepare --config {config} --data.prepared {run} --data.overwrite | no part of it: 'checkpoints'
train --config {config} --train.out '' | train.out is '': it is empty
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_mistakes_get_one_clear_line(tiny_config, tiny_run, tmp_path, monkeypatch, ran, mistake):
    if " || " in mistake:
        monkeypatch.setattr(loading, "load", None)
    held = {"file": b"precious", "latin": b"1+1?\ncaf\xe9?\n", "folder/thesis.tex": b"all my work"}
    held |= {"q.jsonl": b'{"question": "1+1?"}\n{"quest": "2+2?"}\n', "latin.gz": gzip.compress(held["latin"])}
    (tmp_path / "folder").mkdir()
    for name, content in held.items():
        (tmp_path / name).write_bytes(content)
    names = {name: tmp_path / name for name in ("new", "folder", "file", "latin")} | {"jsonl": tmp_path / "q.jsonl"}
    names |= {"config": tiny_config, "run": tiny_run, "long": "1" * 5000, "prepared": tiny_config.parent / "prepared"}
    command, message = (part.format(**names) for part in re.split(r" \|\|? ", mistake))
    told = ran(command, 2)
    assert message in told.err and "Traceback" not in told.err and told.out == ""
    assert told.err.rstrip().splitlines()[-1].startswith("jaxblock: ")
    # Nothing that was there is touched, nothing half-made is left.
    files = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert files == held and len(list(tmp_path.iterdir())) == 5


def test_mistyped_flags_are_explained(tiny_config, capsys):
    for flags, message in {
        "--train.step 3": "--train.steps",
        "--train.steps many": "invalid literal for int",
        "--method.law exact": "exact_count",
        "--optimizer.lr": "--optimizer.lr",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--config", str(tiny_config), *flags.split()])
        assert message in "".join(capsys.readouterr())


def test_a_traceback_is_shown_on_request_and_of_a_bug(monkeypatch, ran):
    with pytest.raises(UserError, match="nowhere.yaml"):
        ran("train --config nowhere.yaml --traceback")
    unknown = Mock(side_effect=RuntimeError("Unable to initialize backend 'x': Backend 'x' is not in the list"))
    monkeypatch.setitem(cli.VERBS, "inspect", cli.VERBS["inspect"]._replace(run=unknown))
    assert "JAX_PLATFORMS chooses the device" in ran("inspect", 2).err
    broken = cli.VERBS["inspect"]._replace(run=lambda options, config: 1 // 0)
    monkeypatch.setitem(cli.VERBS, "inspect", broken)
    told = ran("inspect", 1).err
    assert "ZeroDivisionError" in told and "this is a bug" in told


def test_output_is_utf8_whatever_the_locale_and_may_be_closed(monkeypatch):
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding="ascii"))
    monkeypatch.setenv("COLUMNS", "1")
    cli._set_up_output()
    print("\u00e9", flush=True)
    assert held.getvalue() == b"\xc3\xa9\n" and os.environ["COLUMNS"] == "20"
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setitem(cli.VERBS, "inspect", cli.VERBS["inspect"]._replace(run=lambda options, config: 0))
    assert main(["inspect"]) == 0
    # Messages for a standard error that is closed are not printed among the results, nor is closed output an error.
    command = f"{shlex.quote(sys.executable)} -m jaxblock presets"
    for line, code, said in ((f"{command} nothing 2>&-", 2, b""), (f"{command} <&- >&-", 0, b"")):
        done = subprocess.run(["sh", "-c", line], capture_output=True, cwd=ROOT, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (code, said)


def test_flags_come_before_the_file_and_the_file_before_defaults(tiny_config, tiny_run, capsys):
    options = cli.parse("train", shlex.split(f"--config {tiny_config} --train.seed 5 --model.n-layers 1"))
    assert (options.train.seed, options.model.n_layers, options.train.steps) == (5, 1, 120)
    assert (options.optimizer.lr, options.optimizer.b1) == (0.01, 0.9)
    options = cli.parse("decode", shlex.split(f"--checkpoint {tiny_run} --decode.temperature 0.5 1+1? 2+2?"))
    assert options.prompts == ("1+1?", "2+2?")  # a checkpoint brings its own settings
    assert (options.canvas.block, options.decode.batch_size, options.decode.temperature) == (4, 4, 0.5)
    for null in (["--data.test", "null"], ["--data.test=null"]):
        assert cli.parse("prepare", null).data.test is None
    assert cli.parse("decode", ["--checkpoint", "x", "null"]).prompts == ("null",)
    capsys.readouterr()
    assert (
        cli.parse("train", ["--train.seed=1", "--train.debug", "--train.seed", "2", "--train.no-debug"]).train.seed == 2
    )
    told = capsys.readouterr().err
    assert "--train.seed is given twice (1, 2): the last counts" in told and "--train.no-debug is given twice" in told
    assert cli.parse("decode", ["--checkpoint", "x", "--", "--x", "--x"]).prompts == ("--x", "--x")


# Flags, and those of them that the verb does not read; {shared} has fields that it does not read either.
UNREAD = """
train {shared} |
train {shared} --evaluate.grader exact --evaluate.nelbo_samples 3 --data.weights 0.5 0.5 --data.verify |
train {shared} --evaluate.problems 6 --evaluate.split validation | evaluate.problems
train {tiny} --evaluate.nelbo_rows 8 --data.max_records 0 --data.prompt_field question --lora.rank 2 --lora.alpha 8 |
train --evaluate.problems 6 --evaluate.no-nelbo | evaluate.problems evaluate.nelbo
train {tiny} --data.max_records 3 --data.system x --data.overwrite | data.max_records data.system data.overwrite
train {tiny} --lora.alpha 8 --lora.dropout 0.1 | lora.alpha lora.dropout
plan --topology cpu-8 {shared} --lora.alpha 8 | lora.alpha
inspect {tiny} --train.batch_size 4 --train.seed 1 --data.template chat | data.template train.batch_size
evaluate --out x --checkpoint {run} --data.max_records 3 --evaluate.problems 6 --evaluate.nelbo_rows 6 | data.max_records
evaluate --out x --checkpoint {run} --evaluate.no_nelbo --evaluate.nelbo_rows 6 --evaluate.split test | evaluate.nelbo_rows
evaluate --out x --checkpoint {run} {shared} --evaluate.no_nelbo |
decode --checkpoint {run} --data.template chat --data.mask_token a --data.prompt_field b --data.system c | data.template data.mask_token
prepare --data.tokenizer a.json --data.vocab_size 9 --data.level hard | data.vocab_size
prepare --data.train a.jsonl --data.level hard --data.builtin_train 7 --data.vocab_size 9 | data.level data.builtin_train
prepare --data.recipe gsm8k --data.validation a.jsonl --data.validation_records 3 --data.seed 1 | data.validation_records
"""


@pytest.mark.parametrize("case", UNREAD.strip().splitlines())
def test_flags_that_a_verb_does_not_read_are_named(tiny_config, tiny_run, tmp_path, case):
    shared = "evaluate: {problems: 5, split: validation, nelbo_rows: 3}\ndata: {max_records: 9}\nlora: {alpha: 3.0}"
    (tmp_path / "shared.yaml").write_text(shared)
    names = {"shared": f"--config {tmp_path / 'shared.yaml'}", "tiny": f"--config {tiny_config}", "run": tiny_run}
    command, _, unread = case.partition("|")
    verb, *flags = command.format(**names).split()
    options = cli.parse(verb, flags)
    config = replace(Config(), **cli._sections(options, Config))  # not checked: adapters need trained weights
    told = unused_flags(verb, options, config, read_manifest(tiny_config.parent / "prepared"))
    assert [re.match(r"--(\S+) (?:does not|has no)", line)[1] for line in told] == unread.split()


def test_a_closed_pipe_is_no_error_and_nothing_heavy_is_imported(tiny_run):
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


# Where each verb first writes into the folder or file that it makes.
FIRST_WRITES = {
    "prepare --config {config} --data.prepared {out}": (prepare, "write_splits"),
    "train --config {config} --train.out {out}": (run_folder, "copy_files"),
    "decode --checkpoint {run} 1+1? --out {out}": (os, "fsync"),
    "evaluate --checkpoint {run} --out {out} --evaluate.problems 1 --evaluate.no_nelbo": (problems, "format_problems"),
    "export --checkpoint {run} --out {out}": (companions, "copy_files"),
}


@pytest.mark.parametrize("command", FIRST_WRITES, ids=lambda command: command.split()[0])
def test_a_full_disk_leaves_nothing_that_looks_whole(tiny_config, tiny_run, tmp_path, monkeypatch, ran, command):
    full = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr(*FIRST_WRITES[command], full)
    told = ran(command.format(config=tiny_config, run=tiny_run, out=tmp_path / "out"), 2).err
    assert "the disk is full" in told and list(tmp_path.iterdir()) == []


def test_a_full_disk_under_a_checkpoint_keeps_the_one_before(tiny_config, tmp_path, monkeypatch, ran):
    real = AsyncCheckpointer.save

    def save(orbax: Any, folder: Any, *arguments: Any, **options: Any) -> None:
        if int(Path(folder).name) > 4:
            raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")
        real(orbax, folder, *arguments, **options)

    monkeypatch.setattr(AsyncCheckpointer, "save", save)
    flags = "--train.save_every 4 --train.eval_every 0 --train.steps 10"
    told = ran(f"train --config {tiny_config} --train.out {tmp_path / 'run'} {flags}", 2).err
    assert "step 8: no checkpoint was written" in told and "the disk is full; the last whole one is of step 4" in told
    assert "step 10/10" in told and "the last one, could not be saved" in told
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]

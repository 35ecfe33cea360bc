"""Property: whatever stands in a file of settings, in a JSON file or after a flag, it is read or is refused by one clear message, soon."""

import contextlib
import copy
import dataclasses
import datetime
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import typing
import warnings
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings

from jaxblock.cli import VERBS, main
from jaxblock.config.checks import check_config
from jaxblock.config.config import Config
from jaxblock.config.recorded import read_block
from jaxblock.config.yaml import config_from_tree, load_config, to_yaml
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.errors import UserError
from jaxblock.huggingface.load import load_checkpoint, read_architecture
from jaxblock.huggingface.peft import load_adapter
from jaxblock.huggingface.tensor_files import scan_folder
from jaxblock.models.families import registry
from jaxblock.training.checkpoints.run_folder import open_run
from jaxblock.training.observe.metrics import MetricsWriter, read_metrics
from jaxblock.training.stored_text import read_text

ROOT = Path(__file__).parents[1]
QUICK = settings(max_examples=60, deadline=10_000, suppress_health_check=list(HealthCheck), database=None)

FIELDS = [(section, field.name) for section in Config().sections() for field in dataclasses.fields(section)]
ODD_JSON = st.sampled_from([
    None, True, False, 0, 1, -1, 2**31, 10**12, 10**400, 0.5, 1e-300, 1e39, float("nan"), float("inf"), "", "None", "\ud800",
    "a\0b", "\x1b[31m", "x" * 5000, [], {}, [[]], [0], [-1, "q"], [None], {"a": 1}, {"": []}, "llama", "float32", 2 * 10**9,
])  # fmt: skip
ODD = ODD_JSON | st.sampled_from([
    2, 7, -(2**31), 2**40, 0.0, -0.0, 1.0, float("-inf"), " ", "nan", "1e5", "1e999", "\u202e", [-1], [1, 1], [1, 10**12], ["q"],
    ["\ud800"], datetime.date(2001, 1, 1), b"x",
])  # fmt: skip
TEXTS = st.text(max_size=8) | st.from_regex(r"[\[\]{}&*!|>?:,'\"\-<~ \n0-9a-e]{0,40}", fullmatch=True)


def is_refused(read: Any, *arguments: Any) -> bool:
    """Returns whether a function refuses what it is given, which it must do by one clear message."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(*arguments)
        return False
    except UserError as error:
        text = str(error)
        assert text and len(text) < 8000 and all(line.isprintable() for line in text.splitlines()), text
        return True


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Draws settings of a config: odd values, and values of the field's own type."""
    tree: dict[str, Any] = {}
    for section, name in draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=4, unique_by=str)):
        own = st.from_type(typing.get_type_hints(type(section))[name])
        tree.setdefault(section.section_name, {})[name] = draw(ODD | own | st.integers(-3, 70))
    return tree


def write_and_read(file: Path, tree: dict[str, Any]) -> None:
    """Makes a config of settings, and reads back what is written of it."""
    config = check_config(config_from_tree(tree, "here"))
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(file)) == config


@QUICK
@given(trees())
@example({"decode": {"stop_ids": [10**400]}})
@example({"decode": {"stop_ids": [4, 5]}, "data": {"system": "Be: brief"}})
def test_any_settings(tmp_path_factory, tree):
    is_refused(write_and_read, tmp_path_factory.getbasetemp() / "any.yaml", tree)


@QUICK
@given(TEXTS)
def test_any_text_in_a_file_of_settings(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    is_refused(lambda: check_config(load_config(str(file))))


# JSON files

ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none", "lora_dropout": 0.0,
           "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "base_model_name_or_path": "x", "use_rslora": False}  # fmt: skip


def read_config(folder: Path) -> object:
    arch = read_architecture(folder)
    return registry.param_table(arch), registry.to_hf(arch, "float32")


def read_all_metrics(folder: Path) -> object:
    MetricsWriter(folder, 10**6, say=lambda text: None).close()
    return read_metrics(folder / "metrics.jsonl")


FILES = {
    "export/config.json": read_config,
    "export/generation_config.json": read_block,
    "export/tokenizer_config.json": lambda folder: (
        load_tokenizer(folder),
        read_text(folder, read_architecture(folder)),
    ),
    "indexed/model.safetensors.index.json": load_checkpoint,
    "adapter/adapter_config.json": lambda folder: load_adapter(folder, read_architecture(folder.parent / "export")),
    "prepared/manifest.json": open_prepared,
    "run/model.json": open_run,
    "run/metrics.jsonl": read_all_metrics,
}
"""What reads the folder of each file."""


@pytest.fixture(scope="module")
def folders(tiny_run: Path, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of small folders of each kind."""
    root = tmp_path_factory.mktemp("kinds")
    for name in ("export", "indexed"):
        shutil.copytree(tiny_export, root / name)
    (root / "indexed/model.safetensors").rename(root / "indexed/part.safetensors")
    index = {"weight_map": dict.fromkeys(scan_folder(root / "export").stored, "part.safetensors")}
    (root / "indexed/model.safetensors.index.json").write_text(json.dumps(index))
    (root / "adapter").mkdir()
    (root / "adapter/adapter_config.json").write_text(json.dumps(ADAPTER))
    shutil.copytree(tiny_run.parent / "prepared", root / "prepared")
    shutil.copytree(tiny_run, root / "run", ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    return root


@st.composite
def odd_inside(draw: st.DrawFn, value: Any) -> Any:
    """Draws a JSON value in which one value is replaced, taken out or added; of a list's, one of the first four.

    Where the value itself is taken out, that is ``...``.
    """
    inside = list(value) if isinstance(value, dict) else range(min(4, len(value))) if isinstance(value, list) else ()
    at = draw(st.sampled_from([..., *inside, *(["extra"] if isinstance(value, dict) else [])]))
    if at is ...:
        return draw(ODD_JSON | st.just(...))
    found, new = copy.copy(value), draw(odd_inside(value[at])) if at in inside else draw(ODD_JSON)
    if new is ...:
        del found[at]
    else:
        found[at] = new
    return found


def is_refused_as(file: Path, name: str, content: str) -> bool:
    """Returns whether a file with this content is refused; puts the file back."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        return is_refused(FILES[name], file.parent)
    finally:
        file.unlink()
        if before is not None:
            file.write_bytes(before)


def check_any_changes(file: Path, name: str, examples: int) -> None:
    """Tries this number of changes of a file."""
    content = file.read_text() if file.exists() else "{}"
    value = json.loads(content.splitlines()[0] if name.endswith(".jsonl") else content)

    @settings(QUICK, max_examples=examples)
    @given(odd_inside(value))
    def check(odd: Any) -> None:
        is_refused_as(file, name, json.dumps({} if odd is ... else odd, default=str) + "\n")

    check()


@pytest.mark.parametrize("name", FILES)
def test_any_change_of_a_file_and_what_is_no_json(folders, name):
    check_any_changes(folders / name, name, 8)
    nested, large = "[" * 100_000, '{"a": ' + "9" * 5000 + "}"
    for content in (nested, "", "null", '{"a": 1, "a": 2}', "\ud800", "\x00", large, "[]", "5"):
        # A line of metrics that cannot be read is set aside, so that the run goes on.
        assert is_refused_as(folders / name, name, content) == ("metrics" not in name), content[:20]


# At length, in a process of its own, where nothing but jaxblock itself checks types

VALUES = ["0", "-1", "1", "3", "2147483648", "1099511627776", "nan", "inf", "-inf", "1e-300", "1e39", "", " ", "None", "True",
          "/nowhere", "x" * 300, "\x1b[31m", "\udcff", "1 2", "9" * 400, "[" * 200, "{prompt}", "hf:", "auto", "none"]  # fmt: skip
LEAVE_ALONE = {"loader_workers", "steps", "watchdog_seconds"}  # processes, hours and reports that would be meant
SECONDS = 60
"""The processor seconds that a verb may take; compiling takes up to 10 of them on a quiet machine."""


def check_any_flags(always: dict[str, str], examples: int) -> None:
    """Runs this number of command lines, each with the flags of its verb and one more; a verb that takes too long ends all."""
    draw, codes = random.Random(0), []
    for at in range(examples):
        verb = draw.choice(sorted(always))
        sections = {field.name for field in dataclasses.fields(VERBS[verb].options)}
        section = draw.choice([section for section in Config().sections() if section.section_name in sections])
        name = draw.choice([field.name for field in dataclasses.fields(section) if field.name not in LEAVE_ALONE])
        arguments = (always[verb] + (str(at) if verb == "evaluate" else "")).split()
        sys.argv = ["jaxblock", verb, *arguments, f"--{section.section_name}.{name}", *draw.choice(VALUES).split(" ")]
        print(ascii(sys.argv), file=sys.stderr, flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
            codes.append(2)  # of a flag that cannot be read, where the parser exits
            codes[-1] = main()
        assert codes[-1] in (0, 2) and "Traceback" not in said.getvalue(), f"{codes[-1]}: {said.getvalue()[-3000:]}"
    assert {0, 2} <= set(codes)


@pytest.mark.slow
def test_any_settings_files_and_flags_as_users_have_them(folders, tiny_config, run_copy, tmp_path):
    """All in one process: in one each, importing and compiling would take nearly all of the time."""
    always = {
        "prepare": f"--config {tiny_config} --data.prepared {tmp_path / 'prepared'} --data.overwrite",
        "inspect": f"--config {tiny_config}",
        "decode": f"--checkpoint {run_copy} 1+2?",
        "evaluate": f"--checkpoint {run_copy} --evaluate.problems 2 --evaluate.nelbo_rows 2 --out {tmp_path}/out",
    }
    command = [sys.executable, "-m", "tests.test_any_input", str(folders), json.dumps(always)]
    how = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-4000:]}"


if __name__ == "__main__":
    place = Path(sys.argv[1])

    @settings(QUICK, max_examples=1000)
    @given(trees())
    def check_settings(tree: dict[str, Any]) -> None:
        is_refused(write_and_read, place / "any.yaml", tree)

    check_settings()
    for each in FILES:
        check_any_changes(place / each, each, 300)
    check_any_flags(json.loads(sys.argv[2]), 50)

"""Property: whatever stands in a JSON file or after a flag, it is read or is refused by one clear message, soon."""

import contextlib
import copy
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from jaxblock.cli import VERBS, main
from jaxblock.config.config import Config
from jaxblock.config.recorded import read_block
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
from tests.config.test_any_value import ODD_JSON, is_refused_clearly

ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none", "lora_dropout": 0.0,
           "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "base_model_name_or_path": "x", "use_rslora": False}  # fmt: skip


def read_config(folder: Path) -> object:
    arch = read_architecture(folder)
    return registry.param_table(arch), registry.to_hf(arch, "float32")


def read_all_metrics(folder: Path) -> object:
    MetricsWriter(folder, 10**6, say=lambda text: None).close()
    return read_metrics(folder / "metrics.jsonl")


ARCH: list[Any] = []
FILES = {
    "config": ("export", "config.json", read_config),
    "generation": ("export", "generation_config.json", read_block),
    "tokenizer": ("export", "tokenizer_config.json", lambda f: (load_tokenizer(f), read_text(f, ARCH[0]))),
    "index": ("indexed", "model.safetensors.index.json", load_checkpoint),
    "adapter": ("adapter", "adapter_config.json", lambda folder: load_adapter(folder, ARCH[0])),
    "manifest": ("prepared", "manifest.json", open_prepared),
    "model": ("run", "model.json", open_run),
    "metrics": ("run", "metrics.jsonl", read_all_metrics),
}
"""The folder, the file in it and its reader, by a short name."""


@pytest.fixture(scope="module")
def folders(tiny_run: Path, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of small folders of each kind."""
    root = tmp_path_factory.mktemp("kinds")
    for name in ("export", "indexed"):
        shutil.copytree(tiny_export, root / name)
    ARCH[:] = [read_architecture(tiny_export)]
    (root / "indexed/model.safetensors").rename(root / "indexed/part.safetensors")
    index = {"weight_map": dict.fromkeys(scan_folder(root / "export").stored, "part.safetensors")}
    (root / "indexed/model.safetensors.index.json").write_text(json.dumps(index))
    (root / "adapter").mkdir()
    (root / "adapter/adapter_config.json").write_text(json.dumps(ADAPTER))
    shutil.copytree(tiny_run.parent / "prepared", root / "prepared")
    shutil.copytree(tiny_run, root / "run", ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    return root


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the paths to all values inside a JSON value, to at most four of each list, and to one more of each object."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    extra = [(*path, "extra")] if isinstance(value, dict) else []
    return [path, *extra] + [place for key, inner in items for place in places(inner, (*path, key))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Returns a copy with the value at a path replaced; ``...`` takes it out."""
    if not path:
        return {} if new is ... else new
    result = copy.deepcopy(value)
    inside = result
    for key in path[:-1]:
        inside = inside[key]
    if new is not ...:
        inside[path[-1]] = new
    elif path[-1] != "extra":
        del inside[path[-1]]
    return result


def is_refused(folders: Path, kind: str, content: str) -> bool:
    """Returns whether a file with this content is refused, which must happen by one clear message; puts the file back."""
    folder, name, read = FILES[kind]
    path = folders / folder / name
    before = path.read_bytes() if path.exists() else None
    try:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folders / folder)
        return False
    except UserError as error:
        assert is_refused_clearly(error), str(error)
        return True
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_json_are_refused(folders, kind):
    nested, large = "[" * 100_000, '{"a": ' + "9" * 5000 + "}"
    for content in (nested, "", "null", '{"a": 1, "a": 2}', "\ud800", "\x00", large, "[]", "5"):
        # A line of metrics that cannot be read is set aside, so that the run goes on.
        assert is_refused(folders, kind, content) == (kind != "metrics"), content[:20]


def check_any_changes(folders: Path, kind: str, examples: int) -> None:
    """Tries this number of changes of a file."""
    path = folders / FILES[kind][0] / FILES[kind][1]
    line = path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text() if path.exists() else "{}"
    value = json.loads(line)

    @settings(max_examples=examples, deadline=10_000, suppress_health_check=list(HealthCheck), database=None)
    @given(where=st.sampled_from(places(value)), new=ODD_JSON | st.just(...))
    def check(where: tuple[Any, ...], new: Any) -> None:
        is_refused(folders, kind, json.dumps(changed(value, where, new), default=str) + "\n")

    check()


@pytest.mark.parametrize("kind", FILES)
def test_any_change(folders, kind):
    check_any_changes(folders, kind, 8)


@pytest.mark.slow
def test_any_change_at_length_as_users_run_it(folders):
    """In a process of its own, where nothing but jaxblock itself checks types."""
    command = [sys.executable, "-m", "tests.test_any_input", str(folders), "600"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


VALUES = ["0", "-1", "1", "3", "2147483648", "1099511627776", "nan", "inf", "-inf", "1e-300", "1e39", "", " ", "None", "True",
          "/nowhere", "x" * 300, "\x1b[31m", "\udcff", "1 2", "9" * 400, "[" * 200, "{prompt}", "hf:", "auto", "none"]  # fmt: skip
LEAVE_ALONE = {"loader_workers", "steps", "watchdog_seconds"}  # processes, hours and reports that would be meant
SECONDS = 60
"""The processor seconds that a verb may take; compiling takes up to 10 of them on a quiet machine."""


@pytest.mark.slow
def test_any_flag(tiny_config, run_copy, tmp_path):
    """All in one process: in one each, importing and compiling would take nearly all of the time."""
    always = {
        "prepare": f"--config {tiny_config} --data.prepared {tmp_path / 'prepared'} --data.overwrite",
        "inspect": f"--config {tiny_config}",
        "decode": f"--checkpoint {run_copy} 1+2?",
        "evaluate": f"--checkpoint {run_copy} --evaluate.problems 2 --evaluate.nelbo_rows 2 --out {tmp_path}/out",
    }
    command = [sys.executable, "-m", "tests.test_any_input", "flags", json.dumps(always)]
    how = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-4000:]}"


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


if __name__ == "__main__":
    if sys.argv[1] == "flags":
        check_any_flags(json.loads(sys.argv[2]), 50)
    else:
        ARCH[:] = [read_architecture(Path(sys.argv[1]) / "export")]
        for each in FILES:
            check_any_changes(Path(sys.argv[1]), each, int(sys.argv[2]))

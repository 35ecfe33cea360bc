"""Property: whatever stands in a JSON file that somebody gave, it is read or is refused by one clear message, soon."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

import jaxblock
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
Read = Callable[[Path], object]


def read_config(folder: Path) -> object:
    arch = read_architecture(folder)
    return registry.param_table(arch), registry.to_hf(arch, "float32")


def read_adapter(folder: Path) -> object:
    return load_adapter(folder, ARCH[0])


def read_texts(folder: Path) -> object:
    return load_tokenizer(folder), read_text(folder, ARCH[0])


def read_all_metrics(folder: Path) -> object:
    writer = MetricsWriter(folder, 10**6, say=lambda text: None)
    writer.close()
    return read_metrics(folder / "metrics.jsonl")


ARCH: list[Any] = []
FILES: dict[str, tuple[str, str, Read]] = {
    "config": ("export", "config.json", read_config),
    "generation": ("export", "generation_config.json", read_block),
    "tokenizer": ("export", "tokenizer_config.json", read_texts),
    "index": ("indexed", "model.safetensors.index.json", load_checkpoint),
    "adapter": ("adapter", "adapter_config.json", read_adapter),
    "manifest": ("prepared", "manifest.json", open_prepared),
    "model": ("run", "model.json", open_run),
    "metrics": ("run", "metrics.jsonl", read_all_metrics),
}
"""The folder, the file in it and its reader, by a short name."""


@pytest.fixture(scope="module")
def folders(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of small folders of each kind."""
    root = tmp_path_factory.mktemp("kinds")
    model = jaxblock.load(tiny_run)
    model.save(root / "export")
    ARCH[:] = [model.arch]
    shutil.copytree(root / "export", root / "indexed")
    (root / "indexed/model.safetensors").rename(root / "indexed/part.safetensors")
    names = scan_folder(root / "export").stored
    index = {"weight_map": dict.fromkeys(names, "part.safetensors")}
    (root / "indexed/model.safetensors.index.json").write_text(json.dumps(index))
    (root / "adapter").mkdir()
    (root / "adapter/adapter_config.json").write_text(json.dumps(ADAPTER))
    shutil.copytree(tiny_run.parent / "prepared", root / "prepared")
    shutil.copytree(tiny_run, root / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return root


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the paths to all values inside a JSON value, to at most four of each list."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Returns a copy with the value at a path replaced; ``...`` takes it out."""
    if not path:
        return {} if new is ... else new
    result = copy.deepcopy(value)
    inside = result
    for key in path[:-1]:
        inside = inside[key]
    if new is ...:
        del inside[path[-1]]
    else:
        inside[path[-1]] = new
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


def one_change(folders: Path, kind: str, data: st.DataObject) -> None:
    path = folders / FILES[kind][0] / FILES[kind][1]
    line = path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text() if path.exists() else "{}"
    value = json.loads(line)
    where = data.draw(st.sampled_from(places(value)))
    new = data.draw(ODD_JSON | st.just(...) | st.just("extra"))
    if new == "extra":
        where, new = (*where, "extra"), data.draw(ODD_JSON)
        if not isinstance(changed(value, where[:-1], None) if not where[:-1] else value, dict):
            where = ("extra",)
    try:
        content = json.dumps(changed(value, where, new))
    except (TypeError, KeyError, IndexError):
        content = json.dumps(new, default=str)
    is_refused(folders, kind, content + "\n")


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_json_are_refused(folders: Path, kind: str) -> None:
    for content in (
        "[" * 100_000,
        "",
        "null",
        '{"a": 1, "a": 2}',
        "\ud800",
        "\x00",
        '{"a": ' + "9" * 5000 + "}",
        "[]",
        "5",
    ):
        # A line of metrics that cannot be read is set aside, so that the run goes on.
        assert is_refused(folders, kind, content) == (kind != "metrics"), content[:20]


def check_any_changes(folders: Path, kind: str, examples: int) -> None:
    """Tries this number of changes of a file."""
    quick = settings(max_examples=examples, deadline=10_000, suppress_health_check=list(HealthCheck), database=None)

    @quick
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        one_change(folders, kind, data)

    check()


@pytest.mark.parametrize("kind", FILES)
def test_any_change(folders: Path, kind: str) -> None:
    check_any_changes(folders, kind, 8)


@pytest.mark.slow
def test_any_change_at_length_as_users_run_it(folders: Path) -> None:
    """In a process of its own, where nothing but jaxblock itself checks types."""
    command = [sys.executable, "-m", "tests.test_any_file", str(folders), "600"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    ARCH[:] = [read_architecture(Path(sys.argv[1]) / "export")]
    for each in FILES:
        check_any_changes(Path(sys.argv[1]), each, int(sys.argv[2]))

"""Short runs for tests: flags that leave evaluations out, the rows of metrics, runs just before their first step."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import pytest
from rich.console import Console

import jaxblock
from benchmarks.sessions import loaded_session
from jaxblock.cli import config_of, parse
from jaxblock.config.config import Config
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.observe.metrics import read_metrics
from jaxblock.training.session import Session

QUIET = ["--train.eval_every", "0", "--train.eval_problems", "0", "--train.eval_nelbo_rows", "0"]


def rows(run: Path | str, kind: str = "train") -> list[dict[str, Any]]:
    """Returns the rows of one kind of a run's metrics, in the order of the file, without speeds."""
    file = f"{run}/metrics.jsonl"
    local = not file.startswith("gs://")
    found = map(json.loads, Path(file).read_text().splitlines()) if local else read_metrics(file).train
    return [{k: v for k, v in row.items() if "_per_second" not in k} for row in found if row["kind"] == kind]


def config(file: Path, *flags: str) -> Config:
    """Returns the checked config that ``jaxblock train`` makes of a file and flags."""
    return config_of(parse("train", ["--config", str(file), *flags]))


def session(settings: Config, console: Console | None = None) -> Session:
    """Returns a run whose state is on the devices; its step is not compiled."""
    return loaded_session(settings, console or Console(quiet=True))


def check_same(run: Path | str, expected: Path, kinds: tuple[str, ...] = ("train", "eval")) -> None:
    """Asserts that two runs have the same last parameters, bit for bit, and the same rows of these kinds."""
    ours, theirs = (jax.device_get(jaxblock.load(folder).params) for folder in (run, expected))
    chex.assert_trees_all_equal(ours, theirs)
    for kind in kinds:
        assert rows(run, kind) == rows(expected, kind)


@contextlib.contextmanager
def checkpoints_closed() -> Iterator[list[CheckpointReader]]:
    """Asserts that all checkpoints that are opened inside are closed, else they keep threads of Orbax; gives those opened so far."""
    opened: list[CheckpointReader] = []
    closed: list[CheckpointReader] = []
    init, close = CheckpointReader.__init__, CheckpointReader.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointReader, "__init__", lambda self, run: opened.append(self) or init(self, run))
        patch.setattr(CheckpointReader, "close", lambda self: closed.append(self) or close(self))
        yield opened
    assert set(opened) == set(closed)


def flip_a_bit(file: Path) -> None:
    """Damages a file in its middle; its size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 64
    file.write_bytes(content)

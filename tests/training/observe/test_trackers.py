"""Tests what each tracker is given, what happens when one fails, and what is refused before a run starts."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jaxblock.config.config import Config
from jaxblock.config.yaml import config_from_tree
from jaxblock.errors import UserError
from jaxblock.training.observe import trackers
from jaxblock.training.observe.trackers import Trackers
from tests import runs

ROWS: list[dict[str, Any]] = [
    {"step": 1, "kind": "train", "loss": 2.0, "grad_norm": float("nan"), "loss_by_block": [[1.0, 2.0]]},
    {"step": 2, "kind": "eval", "nelbo_per_token": {"mean": 1.5, "se": 0.1}, "grader": "exact"},
]


def _config(out: Path, **train: Any) -> Config:
    out.mkdir(exist_ok=True)
    return config_from_tree({"train": {"out": str(out), **train}}, "here")


class _Page:
    """Stands in for W&B's run and records what it is given."""

    def __init__(self, **given: Any) -> None:
        self.given, self.logged, self.steps, self.finished = given, [], [], False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.steps.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.logged.append(row)
        if len(self.logged) > 1:
            raise RuntimeError("the service has gone\nand more")

    def finish(self) -> None:
        self.finished = True


def _stand_in(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    module = types.ModuleType("wandb")
    module.__spec__ = sys.__spec__
    module.init, module.Settings = init, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_a_tracker_that_fails_stops_nothing_and_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[_Page] = []
    _stand_in(monkeypatch, lambda **given: pages.append(_Page(**given)) or pages[-1])
    config, told = _config(tmp_path / "run", wandb="online", wandb_project="p", tensorboard=True), []
    for begin in (-1, 1):
        log = Trackers(config.train, {"a": 1}, begin, told.append)
        for row in (*ROWS, *ROWS[1:]):
            log.write(row)
        log.flush()
        log.close()
    assert told == ["W&B: metrics may be missing from here on (the service has gone); training goes on"] * 2
    first, second = pages
    assert first.logged[0] == pytest.approx(
        {"step": 1, "train/loss": 2.0, "train/grad_norm": float("nan")}, nan_ok=True
    )
    assert first.logged[1] == {"step": 2, "eval/nelbo_per_token/mean": 1.5, "eval/nelbo_per_token/se": 0.1}
    assert first.steps[-1] == ("*", "step") and first.finished
    wanted = {"project": "p", "name": "run", "mode": "online", "config": {"a": 1}, "resume": "allow"}
    assert wanted.items() <= first.given.items()
    assert first.given["id"] == second.given["id"]  # a resumed run continues the same page
    # The JSON lines have every row, and the resume has removed the rows that came again.
    assert [row["step"] for row in runs.rows(tmp_path / "run", "eval")] == [2, 2]
    assert [row["grad_norm"] for row in runs.rows(tmp_path / "run", "train")] == ["nan"] * 2
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_disk_that_is_full_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    log = Trackers(_config(tmp_path / "run").train, {}, -1, told.append)

    def full(line: str) -> None:
        raise UserError("the disk is full")

    append = log._lines._lines.append
    for then in (full, full, append, full):
        monkeypatch.setattr(log._lines._lines, "append", then)
        log.write(ROWS[0])
    assert (
        told == ["the disk is full; training goes on, and the rows wait"] * 2
    )  # once for each time that the disk is full


def test_what_a_tracker_needs_is_said_before_the_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.sys, "executable", "/my env/python")
    have: set[str] = {"pip"}
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: sys.__spec__ if name in have else None)
    with pytest.raises(UserError, match="train.wandb needs wandb: '/my env/python' -m pip install wandb$"):
        trackers.check_trackers(_config(tmp_path, wandb="offline").train)
    have.clear()  # as in an environment that uv made
    advice = "train.tensorboard needs tensorboardX: uv pip install --python '/my env/python' tensorboardX$"
    with pytest.raises(UserError, match=advice):
        trackers.check_trackers(_config(tmp_path, tensorboard=True).train)
    trackers.check_trackers(_config(tmp_path).train)

    def refuse(**given: Any) -> None:
        raise RuntimeError("api_key not configured")

    _stand_in(monkeypatch, refuse)
    said = r"did not begin \(api_key not configured\); run `wandb login` or set WANDB_API_KEY .*, or set train.wandb to offline$"
    with pytest.raises(UserError, match=said):
        Trackers(_config(tmp_path / "run", wandb="online").train, {}, -1, print)


def test_trackers_that_need_a_local_folder_are_refused_in_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: sys.__spec__)
    for name, train in {
        "train.tensorboard": {"tensorboard": True},
        "train.wandb offline": {"wandb": "offline"},
    }.items():
        config = config_from_tree({"train": {"out": "gs://bucket/run", **train}}, "here")
        with pytest.raises(UserError, match=f"^{name} writes to a local folder, and train.out is gs://bucket/run"):
            trackers.check_trackers(config.train)
    trackers.check_trackers(config_from_tree({"train": {"out": "gs://bucket/run", "wandb": "online"}}, "here").train)


def test_wandb_offline_writes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    told: list[str] = []
    log = Trackers(_config(tmp_path / "run", wandb="offline").train, {"a": 1}, -1, told.append)
    for row in ROWS:
        log.write(row)
    log.close()
    wandb.teardown()  # finish() returns some milliseconds before the file is whole
    assert told == []
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"nelbo_per_token" in written.read_bytes()

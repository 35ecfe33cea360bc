"""Tests checkpoints that are cut short, damaged, refused by the disk, or no longer kept."""

import contextlib
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from jaxblock.errors import UserError
from jaxblock.training.checkpoints import checksums, removal, retention
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.checkpoints.retention import Keep
from jaxblock.training.checkpoints.writer import CheckpointWriter
from jaxblock.training.state import TrainState
from tests import runs

ALL = Keep(9)


def _state(value: float = 1.0) -> TrainState:
    params = {"w": jnp.full((4, 8), value), "blocks": {"q": jnp.arange(64.0) + value}}
    return TrainState(params, {"mu": jax.tree.map(jnp.zeros_like, params)}, jnp.int32(0))


@contextlib.contextmanager
def _writer(run: Path, keep: Keep = ALL) -> Iterator[tuple[CheckpointWriter, list[str]]]:
    """Gives a writer and the list of what it tells; waits for its saves at the end."""
    told: list[str] = []
    writer = CheckpointWriter(run, keep, told.append)
    yield writer, told
    writer.close()


def _saved(run: Path, *steps: int, keep: Keep = ALL, scores: dict[int, float] | None = None) -> list[str]:
    with _writer(run, keep) as (writer, told):
        for step in steps:
            writer.save(_state(float(step)), step, {}, (scores or {}).get(step))
    return told


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("three")
    assert _saved(run, 10, 20, 30) == []
    return run


@pytest.fixture
def run(three: Path, tmp_path: Path) -> Path:
    """Returns a copy of that run for the test to harm."""
    return shutil.copytree(three, tmp_path / "run")


def _largest(folder: Path) -> Path:
    """Returns the largest file that holds an array's bytes."""
    return max((f for f in folder.rglob("params/**/d/*") if f.is_file()), key=lambda f: f.stat().st_size)


def _flip(folder: Path) -> None:
    runs.flip_a_bit(_largest(folder))


def _cut(folder: Path, end: int) -> None:
    _largest(folder).write_bytes(_largest(folder).read_bytes()[:end])


def _rename(folder: Path) -> None:
    """Gives the checkpoint of step 20 the place of step 30's."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "20", folder)


def _unlisted(harm: Callable[[Path], object]) -> Callable[[Path], object]:
    """Takes the checksums away, too."""
    return lambda folder: (checksums.unseal(folder), harm(folder))


def _two_processes(folder: Path) -> None:
    """Leaves what a kill leaves while two processes write their lists."""
    (folder / "whole-0-of-1.json").rename(folder / "whole-0-of-2.json")


HARMS = {
    "flip": (_flip, "holds other bytes than were saved"),
    "truncate": (lambda f: _cut(f, -1), r"has [\d,]+ bytes instead of [\d,]+"),
    "no metadata": (lambda f: (f / "params/_METADATA").unlink(), "params/_METADATA is missing"),
    "cut short": (_two_processes, r"it was never finished \(whole-1-of-2.json is missing\)"),
    "spoilt seal": (lambda f: (f / "whole-0-of-1.json").write_text("{"), "whole-0-of-1.json cannot be read"),
    "rename": (_rename, "it is of step 20 and was renamed"),
    "unlisted": (_unlisted(lambda f: _cut(f, 100)), "it has no checksums and cannot be read"),
    "unlisted, lost": (_unlisted(lambda f: (f / "optimizer/_METADATA").unlink()), "optimizer/_METADATA is missing"),
}
"""What is done to a checkpoint, and how the damage is told."""


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_is_used(run, harm):
    change, problem = HARMS[harm]
    change(run / "checkpoints" / "30")
    before = sorted(f.name for f in (run / "checkpoints" / "30").rglob("*"))
    with _writer(run) as (checkpoints, told):
        assert checkpoints.recover() == 20
        assert len(told) == 1 and re.search(problem, told[0]) and str(run / "damaged" / "30") in told[0]
        assert sorted(f.name for f in (run / "damaged" / "30").rglob("*")) == before
        chex.assert_trees_all_equal(checkpoints.restore(20, _state()).params, _state(20.0).params)
        checkpoints.save(_state(30.0), 30, {})  # the damaged one is out of the way
    assert checkpoints.steps() == [10, 20, 30] and len(told) == 1


def test_the_only_checkpoint_is_not_replaced_silently(run):
    """A damaged one stops the run, and so does a lost one; one that a kill cut short does not, as the run must go on after a kill."""
    folder = run / "checkpoints"
    for step in ("10", "20"):
        shutil.rmtree(folder / step)
    kept = shutil.copytree(folder / "30", run / "kept")
    for harm, problem in ((_flip, r"/30 is damaged \(params.*\), and there is no other"), (shutil.rmtree, " holds no")):
        harm(folder / "30")
        before = sorted(run.rglob("*"))
        with (
            _writer(run) as (checkpoints, _),
            pytest.raises(UserError, match=f"{problem} checkpoint.*train.resume to res"),
        ):
            checkpoints.recover()
        assert sorted(run.rglob("*")) == before
    for harm in (_flip, _two_processes):
        harm(shutil.copytree(kept, folder / "30"))
        with _writer(run) as (checkpoints, _):  # the second time it is as if no checkpoint had ever been finished
            assert checkpoints.recover(begin_again=harm is _flip) is None and checkpoints.steps() == []
    assert sorted(entry.name for entry in (run / "damaged").iterdir()) == ["30", "30-2"]


def test_a_checkpoint_from_before_checksums_is_used_with_a_warning(run):
    for step in (10, 20, 30):
        checksums.unseal(run / "checkpoints" / str(step))
    with _writer(run) as (checkpoints, told):
        assert checkpoints.recover() == 30 and checkpoints.steps() == [10, 20, 30]
        assert len(told) == 1 and "30 has no checksums" in told[0] and "cannot be verified" in told[0]
        chex.assert_trees_all_equal(checkpoints.restore(30, _state()).params, _state(30.0).params)
        checkpoints.save(_state(40.0), 40, {})
    assert checkpoints.steps() == [10, 20, 30, 40] and not (run / "damaged").exists()


def test_what_a_killed_save_or_deletion_left_is_swept_up(run):
    folder = run / "checkpoints"
    shutil.copytree(folder / "30", folder / f"40{ocp.path.atomicity.TMP_DIR_SUFFIX}")
    (folder / "10").rename(folder / "10.deleting")
    with _writer(run) as (checkpoints, _):
        assert checkpoints.recover() == 30
    assert sorted(entry.name for entry in folder.iterdir()) == ["20", "30"]


def test_a_failed_save_is_told_once_and_later_saves_work(tmp_path, monkeypatch):
    """The disk is full when the save's background thread waits for the files."""
    wait_until_finished = ocp.AsyncCheckpointer.wait_until_finished

    def full(orbax: Any) -> None:
        wait_until_finished(orbax)
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")

    with _writer(tmp_path, Keep(1)) as (checkpoints, told):
        checkpoints.save(_state(1.0), 1, {})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", full)
            checkpoints.save(_state(2.0), 2, {})
            checkpoints.wait()
        assert len(told) == 1 and "step 2: no checkpoint was written" in told[0]
        assert told[0].endswith("the disk is full; the last whole one is of step 1")
        assert checkpoints.steps() == [1] and checkpoints.failed == 2
        checkpoints.save(_state(3.0), 3, {})
    assert checkpoints.steps() == [3] and len(told) == 1


def test_a_damaged_checkpoint_that_cannot_be_moved_is_not_written_over(run, monkeypatch):
    folder = run / "checkpoints" / "30"
    _two_processes(folder)
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(removal, "move_folder", Mock(side_effect=OSError("Read-only file system")))
    with _writer(run) as (checkpoints, told):
        assert checkpoints.recover() == 20
        checkpoints.save(_state(30.0), 30, {})
    assert len(told) == 2 and "left where it is" in told[0] and "a damaged checkpoint stands in its place" in told[1]
    assert checkpoints.steps() == [10, 20] and sorted(folder.rglob("*")) == before


def test_a_save_that_ends_while_scores_are_compared_counts(tmp_path, monkeypatch):
    with _writer(tmp_path) as (checkpoints, _):
        checkpoints._saving = 1, 0.5
        monkeypatch.setattr(checkpoints, "steps", lambda: setattr(checkpoints, "_saving", None) or [])
        assert not checkpoints.improves(0.4)


def test_nothing_is_written_into_a_folder_that_takes_no_files_or_of_a_state_with_nans(tmp_path):
    _saved(tmp_path, 1)
    with _writer(tmp_path) as (checkpoints, told):
        checkpoints.save(_state(float("nan")), 2, {})
    assert checkpoints.steps() == [1] and "the state holds NaN or infinity" in told[0]
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file stands here")  # permissions do not bind every user
    assert "step 1: no checkpoint was written" in _saved(tmp_path, 1)[0]


def test_what_is_kept(tmp_path):
    assert retention.superfluous(Keep(2), [1, 2, 3, 4], None) == [1, 2]
    assert retention.superfluous(Keep(1, every=4), [2, 4, 6, 8, 10], None) == [2, 6]
    assert retention.superfluous(Keep(2, best="nelbo"), [1, 2, 3, 4], 1) == [2]
    assert retention.best({1: 0.5, 2: None, 3: 0.7, 4: 0.7, 5: float("nan")}) == 3
    assert retention.best({1: None}) is None
    assert retention.comparable_score("nelbo", {"nelbo_per_token": {"mean": 2.0}}) == -2
    assert retention.comparable_score("pass_at_1", {"pass_at_1": {"correct": 3, "n": 4}}) == 0.75
    assert retention.comparable_score("pass_at_1", {}) is None
    scores = {10: -3.0, 20: -1.0, 30: -2.0, 50: -4.0}
    _saved(tmp_path, 10, 20, 30, 40, 50, keep=Keep(1, 40, "nelbo"), scores=scores)
    with _writer(tmp_path) as (checkpoints, _):
        assert checkpoints.steps() == [20, 40, 50] and checkpoints.best() == 20
        assert [checkpoints.improves(score) for score in (-0.5, -1.0, None)] == [True, False, False]


def test_scores_by_different_metrics_are_not_compared(tmp_path):
    def settings(metric, **evaluate):
        train = {"keep_best": metric, "eval_problems": 8, "eval_nelbo_rows": 4}
        return {
            "train": train,
            "evaluate": {"grader": "exact", "nelbo_samples": None} | evaluate,
            "decode": {"rule": "random"},
        }

    def save(step, config, score):
        keep, scoring = Keep(1, best=config["train"]["keep_best"]), retention.scored_by(config)
        checkpoints = CheckpointWriter(tmp_path, keep, scoring=scoring)
        better = checkpoints.improves(score)
        checkpoints.save(_state(), step, {"config": config}, score)
        checkpoints.wait()
        found = better, checkpoints.steps(), checkpoints.best()
        checkpoints.close()
        return found

    solved, bound = settings("pass_at_1"), settings("nelbo")
    assert save(1, solved, 0.8) == (True, [1], 1) and save(2, solved, 0.5) == (False, [1, 2], 1)
    assert save(3, bound, -9.0) == (True, [3], 3)  # the metric was changed on a resume
    assert save(4, bound, -9.5) == (False, [3, 4], 3)
    assert save(5, settings("nelbo", nelbo_samples=7), -9.4) == (True, [5], 5)
    with contextlib.closing(CheckpointReader(tmp_path)) as reader:
        assert reader.best() == 5
    versions = [retention.scored_by(solved, {"grader_version": version}) for version in (None, "1", "2")]
    assert not any(retention.same_scoring(*two) for two in itertools.combinations(versions, 2))
    assert all(retention.same_scoring(one, retention.scored_by(solved)) for one in versions), (
        "an earlier version names none"
    )
    assert retention.scored_by(bound, {"grader_version": "1"}) == retention.scored_by(bound)
    older = retention.scored_by({"train": {}, "evaluate": {}, "decode": {}})
    assert not retention.same_scoring(older, retention.scored_by(bound))
    new = retention.scored_by(solved | {"decode": {"rule": "random", "of a later version": 1}})
    assert retention.same_scoring(new, retention.scored_by(solved))

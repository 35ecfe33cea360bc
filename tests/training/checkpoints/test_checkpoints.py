"""Tests checkpoints that are cut short, damaged, refused by the disk, or no longer kept."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from jaxblock.config.config import Config
from jaxblock.errors import UserError
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.checkpoints import checksums, removal, retention
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.checkpoints.retention import Keep
from jaxblock.training.checkpoints.writer import CheckpointWriter
from jaxblock.training.state import TrainState
from tests import runs


def _state(value: float = 1.0) -> TrainState:
    params = {"w": jnp.full((4, 8), value), "blocks": {"q": jnp.arange(64.0) + value}}
    return TrainState(params, {"mu": jax.tree.map(jnp.zeros_like, params)}, jnp.int32(0))


ALL = Keep(9)


def _saved(run: Path, steps: list[int], keep: Keep = ALL, scores: dict[int, float] | None = None) -> list[str]:
    told: list[str] = []
    checkpoints = CheckpointWriter(run, keep, told.append)
    for step in steps:
        checkpoints.save(_state(float(step)), step, {}, (scores or {}).get(step))
    checkpoints.close()
    return told


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("three")
    assert _saved(run, [10, 20, 30]) == []
    return run


@pytest.fixture
def run(three: Path, tmp_path: Path) -> Path:
    """Returns a copy of that run for the test to harm."""
    return shutil.copytree(three, tmp_path / "run")


def _largest(folder: Path) -> Path:
    """Returns the largest file that holds an array's bytes."""
    return max((f for f in folder.rglob("params/**/d/*") if f.is_file()), key=lambda f: f.stat().st_size)


def _flip(folder: Path) -> str:
    runs.flip_a_bit(_largest(folder))
    return "holds other bytes than were saved"


def _truncate(folder: Path) -> str:
    content = _largest(folder).read_bytes()
    _largest(folder).write_bytes(content[:-1])
    return f"has {len(content) - 1:,} bytes instead of {len(content):,}"


def _lose_metadata(folder: Path) -> str:
    (folder / "params" / "_METADATA").unlink()
    return "params/_METADATA is missing"


def _cut_short(folder: Path) -> str:
    """Leaves what a kill leaves while two processes write their lists."""
    (folder / "whole-0-of-1.json").rename(folder / "whole-0-of-2.json")
    return "it was never finished (whole-1-of-2.json is missing)"


def _rename(folder: Path) -> str:
    """Gives the checkpoint of step 20 the place of step 30's."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "20", folder)
    return "it is of step 20 and was renamed"


def _unlisted_and_cut(folder: Path) -> str:
    """Damages a checkpoint without checksums in a way that reading notices."""
    checksums.unseal(folder)
    _largest(folder).write_bytes(_largest(folder).read_bytes()[:100])
    return "it has no checksums and cannot be read"


def _unlisted_without_metadata(folder: Path) -> str:
    checksums.unseal(folder)
    (folder / "optimizer" / "_METADATA").unlink()
    return "optimizer/_METADATA is missing"


def _spoil_seal(folder: Path) -> str:
    (folder / "whole-0-of-1.json").write_text("{")
    return "whole-0-of-1.json cannot be read"


@pytest.mark.parametrize(
    "harm",
    [_flip, _truncate, _lose_metadata, _cut_short, _spoil_seal, _rename, _unlisted_and_cut, _unlisted_without_metadata],
)
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_is_used(
    run: Path, harm: Callable[[Path], str]
) -> None:
    problem = harm(run / "checkpoints" / "30")
    before = sorted(f.name for f in (run / "checkpoints" / "30").rglob("*"))
    told: list[str] = []
    checkpoints = CheckpointWriter(run, Keep(9), told.append)
    assert checkpoints.recover() == 20
    assert len(told) == 1 and problem in told[0] and str(run / "damaged" / "30") in told[0]
    assert sorted(f.name for f in (run / "damaged" / "30").rglob("*")) == before
    chex.assert_trees_all_equal(checkpoints.restore(20, _state()).params, _state(20.0).params)
    checkpoints.save(_state(30.0), 30, {})  # the damaged one is out of the way
    checkpoints.close()
    assert checkpoints.steps() == [10, 20, 30] and len(told) == 1


@pytest.mark.parametrize("harm", [_flip, _lose_metadata, _spoil_seal, _rename, _unlisted_and_cut, _cut_short])
def test_the_only_checkpoint_is_not_replaced_silently(run: Path, harm: Callable[[Path], str]) -> None:
    """A damaged one stops the run; one that a kill cut short does not, since the run must go on after a kill."""
    problem = harm(run / "checkpoints" / "30")
    for step in ("10", "20"):
        shutil.rmtree(run / "checkpoints" / step)
    checkpoints = CheckpointWriter(run, ALL)
    if harm is _cut_short:
        (run / "had_checkpoint.json").unlink()  # as if no checkpoint had ever been finished
    else:
        with pytest.raises(UserError, match=rf"30 is damaged \(.*{re.escape(problem)}.*set train.resume to restart"):
            checkpoints.recover()
        assert (run / "checkpoints" / "30").exists()
    assert checkpoints.recover(begin_again=harm is not _cut_short) is None
    assert (run / "damaged" / "30").exists() and checkpoints.steps() == []
    checkpoints.close()


def test_a_checkpoint_from_before_checksums_is_used_with_a_warning(run: Path) -> None:
    for step in (10, 20, 30):
        checksums.unseal(run / "checkpoints" / str(step))
    told: list[str] = []
    checkpoints = CheckpointWriter(run, Keep(9), told.append)
    assert checkpoints.recover() == 30 and checkpoints.steps() == [10, 20, 30]
    assert len(told) == 1 and "30 has no checksums" in told[0] and "cannot be verified" in told[0]
    chex.assert_trees_all_equal(checkpoints.restore(30, _state()).params, _state(30.0).params)
    checkpoints.save(_state(40.0), 40, {})
    checkpoints.close()
    assert checkpoints.steps() == [10, 20, 30, 40] and not (run / "damaged").exists()


def test_a_reader_names_damage_and_moves_nothing(run: Path) -> None:
    _flip(run / "checkpoints" / "30")
    checkpoints = CheckpointReader(run)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _state().params
    )
    with pytest.raises(UserError, match="30 is damaged: params/.*Use another one: --step 10 or 20"):
        checkpoints.restore_params(30, like)
    assert checkpoints.restore_params(20, like)["w"][0, 0] == 20
    checkpoints.close()
    assert not (run / "damaged").exists()


def test_what_a_killed_save_or_deletion_left_is_swept_up(run: Path) -> None:
    folder = run / "checkpoints"
    shutil.copytree(folder / "30", folder / f"40{ocp.path.atomicity.TMP_DIR_SUFFIX}")
    (folder / "10").rename(folder / "10.deleting")
    checkpoints = CheckpointWriter(run, Keep(9))
    assert checkpoints.recover() == 30
    checkpoints.close()
    assert sorted(entry.name for entry in folder.iterdir()) == ["20", "30"]


def test_a_failed_save_is_told_once_and_later_saves_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the save's background thread waits for the files."""
    told: list[str] = []
    checkpoints = CheckpointWriter(tmp_path, Keep(1), told.append)
    checkpoints.save(_state(1.0), 1, {})
    checkpoints.wait()
    wait_until_finished = ocp.AsyncCheckpointer.wait_until_finished
    with monkeypatch.context() as patch:

        def full(orbax: Any) -> None:
            wait_until_finished(orbax)
            raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")

        patch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", full)
        checkpoints.save(_state(2.0), 2, {})
        checkpoints.wait()
    assert len(told) == 1 and "step 2: no checkpoint was written" in told[0]
    assert told[0].endswith("the disk is full; the last whole one is of step 1")
    assert checkpoints.steps() == [1] and checkpoints.failed == 2
    checkpoints.save(_state(3.0), 3, {})
    checkpoints.close()
    assert checkpoints.steps() == [3] and len(told) == 1


def test_a_damaged_checkpoint_that_cannot_be_moved_is_not_written_over(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run / "checkpoints" / "30"
    _cut_short(folder)
    before = sorted(folder.rglob("*"))
    told: list[str] = []
    checkpoints = CheckpointWriter(run, ALL, told.append)

    def refuse(source: Any, target: Any) -> None:
        raise OSError("Read-only file system")

    monkeypatch.setattr(removal, "move_folder", refuse)
    assert checkpoints.recover() == 20
    checkpoints.save(_state(30.0), 30, {})
    checkpoints.close()
    assert len(told) == 2 and "left where it is" in told[0] and "a damaged checkpoint stands in its place" in told[1]
    assert checkpoints.steps() == [10, 20] and sorted(folder.rglob("*")) == before


def test_a_save_that_ends_while_scores_are_compared_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = CheckpointWriter(tmp_path, ALL)
    checkpoints._saving = 1, 0.5

    def ends() -> list[int]:
        checkpoints._saving = None
        return []

    monkeypatch.setattr(checkpoints, "steps", ends)
    assert not checkpoints.improves(0.4)
    checkpoints.close()


def test_a_folder_that_takes_no_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file stands here")  # permissions do not bind every user
    assert "step 1: no checkpoint was written" in _saved(tmp_path, [1])[0]


def test_a_state_with_nans_is_never_written(tmp_path: Path) -> None:
    told = _saved(tmp_path, [1])
    checkpoints = CheckpointWriter(tmp_path, Keep(1), told.append)
    checkpoints.save(_state(float("nan")), 2, {})
    checkpoints.close()
    assert checkpoints.steps() == [1] and "the state holds NaN or infinity" in told[0]


def test_what_is_kept(tmp_path: Path) -> None:
    assert retention.superfluous(Keep(2), [1, 2, 3, 4], None) == [1, 2]
    assert retention.superfluous(Keep(1, every=4), [2, 4, 6, 8, 10], None) == [2, 6]
    assert retention.superfluous(Keep(2, best="nelbo"), [1, 2, 3, 4], 1) == [2]
    assert retention.best({1: 0.5, 2: None, 3: 0.7, 4: 0.7, 5: float("nan")}) == 3
    assert retention.best({1: None}) is None
    assert retention.comparable_score("nelbo", {"nelbo_per_token": {"mean": 2.0}}) == -2
    assert retention.comparable_score("pass_at_1", {"pass_at_1": {"correct": 3, "n": 4}}) == 0.75
    assert retention.comparable_score("pass_at_1", {}) is None
    _saved(tmp_path, [10, 20, 30, 40, 50], Keep(1, 40, "nelbo"), {10: -3.0, 20: -1.0, 30: -2.0, 50: -4.0})
    checkpoints = CheckpointWriter(tmp_path, Keep(1))
    assert checkpoints.steps() == [20, 40, 50] and checkpoints.best() == 20
    assert checkpoints.improves(-0.5) and not checkpoints.improves(-1.0) and not checkpoints.improves(None)
    checkpoints.close()


def test_a_restore_onto_other_meshes_is_exact(three: Path) -> None:
    """Restores onto 8 devices, then a 4 x 2 mesh, then 1 device."""
    checkpoints = CheckpointReader(three)
    for data, fsdp in ((1, 8), (4, 2), (1, 1)):
        mesh = make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
        whole, split = rules.replicated(mesh), rules.sharding(mesh, "batch")
        like = jax.tree.map(lambda leaf, w=whole, s=split: jax.device_put(leaf, s if leaf.ndim == 1 else w), _state())
        found = checkpoints.restore(30, like)
        chex.assert_trees_all_equal(jax.device_get(found.params), jax.device_get(_state(30.0).params))
        assert found.params["blocks"]["q"].sharding.is_equivalent_to(split, 1) and int(found.step) == 30
    checkpoints.close()


def test_the_docs_list_what_a_resumed_run_may_change() -> None:
    text = (Path(__file__).parents[3] / "docs" / "resume.md").read_text()
    table = text.split("| section | fields that may change |")[1].split("\n\n")[0]
    listed = {
        line.split("|")[1].strip(" `"): set(re.findall(r"`(\w+)`", line.split("|")[2]))
        for line in table.split("\n")[2:-1]
    }
    may_change = {section.section_name: section.changeable(saved=True) for section in Config().sections()}
    assert all(listed[section] == may_change[section] for section in ("data", "model", "train")), listed
    assert not any(may_change[name] for name in ("canvas", "method", "optimizer"))
    assert "| `decode`, `evaluate` | all |" in table

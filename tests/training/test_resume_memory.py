"""A resume takes no more memory than a start: the checkpoint is restored where no other state is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import pytest
from rich.console import Console

from benchmarks.resume_memory import LiveBytes, save_first_state
from benchmarks.sessions import loaded_session
from jaxblock.config.config import Config
from jaxblock.config.yaml import load_config
from jaxblock.fit.shapes import bytes_per_device
from jaxblock.training.session import Session


def _changed(config: Config, sections: dict[str, dict[str, Any]]) -> Config:
    fields = {name: dataclasses.replace(getattr(config, name), **changes) for name, changes in sections.items()}
    return dataclasses.replace(config, **fields)


def _loaded(config: Config) -> tuple[Session, int]:
    """Returns a session, and the largest number of bytes that its arrays took of a device until it was loaded."""
    with LiveBytes() as live:
        session = loaded_session(config, Console(quiet=True))
    return session, live.peak


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "float32": {},
    "bfloat16, ema": {"model": {"param_dtype": "bfloat16"}, "optimizer": {"moments": "bfloat16", "ema": 0.9}},
    "int8, ema, split": {"optimizer": {"moments": "int8", "ema": 0.9}, "train": {"fsdp": 4}},
    "adafactor": {"optimizer": {"name": "adafactor"}},
}


@pytest.mark.parametrize("name", CASES)
def test_a_resume_takes_the_memory_of_a_start(tiny_config: Path, tmp_path: Path, name: str) -> None:
    """With every optimizer, with and without a moving average, whole on every device and split over devices."""
    config = _changed(load_config(str(tiny_config)), CASES[name])
    config = _changed(config, {"train": {"out": str(tmp_path / "run")}})
    begun, start = _loaded(config)
    assert start <= 1.05 * bytes_per_device(begun.state)
    _assert_resumed_within(config, begun, start)


def test_a_resume_of_adapters_takes_the_memory_of_a_start(tiny_config: Path, tmp_path: Path) -> None:
    """The adapters are larger than their base, so that a second state would be seen beside it."""
    source = _changed(load_config(str(tiny_config)), {"train": {"out": str(tmp_path / "source")}})
    save_first_state(loaded_session(source, Console(quiet=True)))
    changes = {"model": {"init_from": str(tmp_path / "source")}, "lora": {"rank": 32}, "optimizer": {"ema": 0.9}}
    config = _changed(source, {**changes, "train": {"out": str(tmp_path / "run")}})
    begun, start = _loaded(config)
    assert bytes_per_device(begun.state) > bytes_per_device(begun.frozen) > 0
    resumed = _assert_resumed_within(config, begun, start)
    chex.assert_trees_all_equal(resumed.frozen, begun.frozen)
    assert resumed.base == begun.base


def _assert_resumed_within(config: Config, begun: Session, start: int) -> Session:
    """Saves a session's state, resumes it, and asserts that it is the same state and took at most 1.05 of the bytes."""
    saved, places = jax.device_get(begun.state), jax.tree.map(lambda leaf: leaf.sharding, begun.state)
    save_first_state(begun)
    with LiveBytes() as live:  # what ``begun`` holds was there before
        resumed = loaded_session(config, Console(quiet=True))
    assert resumed.resumed and resumed.step == 1
    assert live.peak <= 1.05 * start
    chex.assert_trees_all_equal(jax.device_get(resumed.state._replace(step=0)), saved._replace(step=0), strict=True)
    for leaf, place in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    resumed.checkpoints.close()
    return resumed

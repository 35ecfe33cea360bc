"""A resume takes no more memory than a start: the checkpoint is restored where no other state is."""

from __future__ import annotations

from pathlib import Path

import chex
import jax
import pytest

from benchmarks.resume_memory import LiveBytes, save_first_state
from jaxblock.config.config import Config
from jaxblock.fit.shapes import bytes_per_device
from jaxblock.training.session import Session
from tests import runs


def _loaded(config: Config) -> tuple[Session, int]:
    """Returns a session, and the largest number of bytes that its arrays took of a device until it was loaded."""
    with LiveBytes() as live:
        session = runs.session(config)
    return session, live.peak


CASES = {
    "float32": [],
    "bfloat16, ema": ["--model.param_dtype", "bfloat16", "--optimizer.moments", "bfloat16", "--optimizer.ema", "0.9"],
    "int8, ema, split": ["--optimizer.moments", "int8", "--optimizer.ema", "0.9", "--train.fsdp", "8"],
    "adafactor": ["--optimizer.name", "adafactor"],
}
SPLIT = "int8, ema, split"


@pytest.mark.parametrize("name", [SPLIT, *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != SPLIT)])
def test_a_resume_takes_the_memory_of_a_start(tiny_config: Path, tmp_path: Path, name: str) -> None:
    """With every optimizer, with and without a moving average, whole on every device and split over devices."""
    config = runs.config(tiny_config, *CASES[name], "--train.out", str(tmp_path / "run"))
    begun, start = _loaded(config)
    assert start <= 1.05 * bytes_per_device(begun.state)
    _assert_resumed_within(config, begun, start)


def test_a_resume_of_adapters_takes_the_memory_of_a_start(tiny_config: Path, tiny_run: Path, tmp_path: Path) -> None:
    """The adapters are larger than their base, so that a second state would be seen beside it."""
    flags = ["--model.init_from", str(tiny_run), "--lora.rank", "32", "--optimizer.ema", "0.9"]
    config = runs.config(tiny_config, *flags, "--train.out", str(tmp_path / "run"))
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
        resumed = runs.session(config)
    assert resumed.resumed and resumed.step == 1
    assert live.peak <= 1.05 * start
    chex.assert_trees_all_equal(jax.device_get(resumed.state._replace(step=0)), saved._replace(step=0), strict=True)
    for leaf, place in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    resumed.checkpoints.close()
    return resumed

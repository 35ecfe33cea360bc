"""A resume takes no more memory than a start: the checkpoint is restored where no other state is."""

import chex
import jax
import pytest

from benchmarks.resume_memory import LiveBytes, save_first_state
from jaxblock.fit.shapes import bytes_per_device
from tests import runs

# Adapters that are larger than their base, so that a second state would be seen beside it.
ADAPTERS = "--model.init_from {run} --lora.rank 32 --optimizer.ema 0.9 --optimizer.moments int8 --train.fsdp 8"
OTHERS = [
    "--optimizer.name adamw",
    "--model.param_dtype bfloat16 --optimizer.moments bfloat16 --optimizer.ema 0.9",
    "--optimizer.moments int8 --optimizer.ema 0.9 --train.fsdp 8",
    "--optimizer.name adafactor",
]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [ADAPTERS, *OTHERS])
def test_a_resume_takes_the_memory_of_a_start(tiny_config, tiny_run, tmp_path, flags):
    """With every optimizer, with and without a moving average, whole on every device and split over devices."""
    out = f" --train.out {tmp_path / 'run'}"
    config = runs.config(tiny_config, *(flags.format(run=tiny_run) + out).split())
    with LiveBytes() as live:
        begun = runs.session(config)
    start = live.peak
    if flags == ADAPTERS:
        assert bytes_per_device(begun.state) > bytes_per_device(begun.frozen) > 0
    else:
        assert start <= 1.05 * bytes_per_device(begun.state)
    saved, places = jax.device_get(begun.state), jax.tree.map(lambda leaf: leaf.sharding, begun.state)
    save_first_state(begun)
    with LiveBytes() as live:  # what ``begun`` holds was there before
        resumed = runs.session(config)
    assert resumed.resumed and resumed.step == 1 and live.peak <= 1.05 * start
    chex.assert_trees_all_equal(jax.device_get(resumed.state._replace(step=0)), saved._replace(step=0), strict=True)
    for leaf, place in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    chex.assert_trees_all_equal(resumed.frozen, begun.frozen)
    assert resumed.base == begun.base
    resumed.checkpoints.close()

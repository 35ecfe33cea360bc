"""Tests files that are read as another architecture than their own: with a mask token, as int8, on any mesh."""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.errors import UserError
from jaxblock.huggingface import placement
from jaxblock.huggingface.load import load_checkpoint, read_architecture
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.families import registry
from jaxblock.models.linear import int8
from jaxblock.parallel.mesh import make_mesh
from jaxblock.parallel.rules import param_shardings


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "tied, mesh",
    [(False, None), (False, (2, 2, 2)), slow(False, (1, 4, 2)), slow(False, (4, 2, 1)), slow(True, (1, 4, 2))],
)
def test_new_rows_are_the_mean_of_the_old(small, saved, tmp_path, tied, mesh):
    which: Any = {"family": "llama", "dtype": jnp.bfloat16, "mask_id": None, "tie_embeddings": tied}
    _, params = small(**which)
    wanted = registry.with_mask(read_architecture(saved(**which)), 40, "same_position")
    assert (wanted.vocab_size, wanted.mask_id, wanted.alignment) == (64, 40, "same_position")
    shardings = None if mesh is None else param_shardings(make_mesh(*mesh), registry.param_table(wanted))
    found, loaded = load_checkpoint(saved(**which), arch=wanted, shardings=shardings)
    assert found == wanted
    for name, axis in {"embed": 0, "head": 1}.items() if not tied else [("embed", 0)]:
        old, new = np.asarray(params[name], np.float32), np.asarray(loaded[name], np.float32)
        np.testing.assert_array_equal(np.take(new, np.arange(40), axis), old)
        mean = np.broadcast_to(np.expand_dims(old.mean(axis), axis), np.take(new, np.arange(24), axis).shape)
        np.testing.assert_allclose(np.take(new, np.arange(40, 64), axis), mean, rtol=2**-8)
        assert loaded[name].dtype == jnp.bfloat16 and (shardings is None or loaded[name].sharding == shardings[name])
    # What grew is written, and read again as it is.
    save_checkpoint(tmp_path / "again", wanted, loaded)
    arch_again, again = load_checkpoint(tmp_path / "again", shardings=shardings)
    assert (arch_again.vocab_size, arch_again.mask_id, arch_again.alignment) == (64, 40, "same_position")
    chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(loaded))


def test_other_sizes_are_named(small, saved):
    wrong = dataclasses.replace(small()[0], d_model=32, alignment="shifted", vocab_size=24, rope_theta=5e5, eos_id=3)
    with pytest.raises(UserError) as caught:
        load_checkpoint(saved(), arch=wrong)
    for text in ("d_model is 16, not 32", "alignment is same_position, not shifted", "vocab_size is 40, more than 24"):
        assert text in str(caught.value)
    assert "rope_theta" in str(caught.value) and "eos_id" not in str(caught.value)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2), slow((1, 4, 2)), slow((4, 2, 1))])
def test_an_int8_base_is_what_quantise_makes_of_each_leaf(small, saved, tmp_path, mesh):
    arch, params = small("dream", jnp.bfloat16)
    table = int8.int8_table(registry.param_table(arch))
    shardings = None if mesh is None else param_shardings(make_mesh(*mesh), table)
    _, loaded = load_checkpoint(saved("dream", jnp.bfloat16), int8=True, shardings=shardings)
    plain = params["blocks"]
    assert loaded["blocks"].keys() == {p.removeprefix("blocks/") for p in table if p.startswith("blocks/")}
    for name, leaf in loaded["blocks"].items():
        if shardings is not None:
            assert leaf.sharding == shardings["blocks"][name]
        if leaf.dtype != jnp.int8:
            continue
        numbers, scale = np.asarray(leaf, np.float32), np.asarray(loaded["blocks"][name + int8.SCALE])
        assert scale.dtype == np.float32 and np.abs(numbers).max() == 127
        error = np.abs(numbers * scale[:, None] - np.asarray(plain[name], np.float32))
        assert (error <= scale[:, None] * 0.51).all()
    np.testing.assert_array_equal(loaded["embed"], params["embed"])
    with pytest.raises(UserError, match=r"int8 base is a rounded copy \(blocks/q.*without int8"):
        save_checkpoint(tmp_path / "again", arch, loaded)


def test_the_transpose_on_an_accelerator_is_the_hosts(saved, monkeypatch):
    """For a CPU matrices are transposed on the host; other devices are sent what the file holds, and transpose it."""
    folder = saved("dream", jnp.bfloat16)
    grown = dataclasses.replace(read_architecture(folder), vocab_size=48)
    shardings = param_shardings(make_mesh(2, 2, 2), registry.param_table(grown))
    load = partial(load_checkpoint, folder, arch=grown, shardings=shardings)
    here = jax.device_get(load()[1])
    monkeypatch.setattr(placement, "_transposed_on_cpu", lambda host, transpose, devices: (host, transpose))
    chex.assert_trees_all_equal(jax.device_get(load()[1]), here)

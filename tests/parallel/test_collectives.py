"""Sums of gradients over devices, against the plain sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.parallel import collectives, rules
from jaxblock.parallel.mesh import make_mesh

Names = tuple[str | None, str | None]
USED = ("embed", "heads")
MESHES = [
    ({"fsdp": 8, "data": 1}, ("embed", "heads"), USED, 8),
    ({"fsdp": 4, "data": 2}, ("embed", "heads"), USED, 2),
    ({"fsdp": 4, "data": 1, "tensor": 2}, ("embed", "heads"), USED, 2),
    ({"fsdp": 4, "data": 1, "tensor": 2}, ("adapter", None), ("embed", None), 8),
    ({"fsdp": 4, "data": 1, "slices": 2}, ("heads", "embed"), ("heads", "embed"), 2),
]
"""Sizes, how the matrix is stored and used, and how many devices sum in one stage: with 2, four or eight take two stages."""


@pytest.mark.parametrize(("sizes", "stored", "used", "one_stage"), MESHES)
def test_parts_add_up_to_the_sum_where_the_matrix_is_stored(sizes, stored, used, one_stage, monkeypatch):
    monkeypatch.setattr(collectives, "_SINGLE_STAGE_LIMIT", one_stage)
    mesh, draw = make_mesh(**sizes), np.random.default_rng(0)
    # Whole numbers: every order of adding gives the same.
    left, right = (draw.integers(-9, 10, (16, 3, width)).astype(np.float32) for width in (8, 16))

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum("bti,bto->io", a, b)

    def total(a: jax.Array, b: jax.Array) -> jax.Array:
        return collectives.sum_over_devices(collectives.partial_sums(product, a, b, used), used, stored)

    with jax.set_mesh(mesh):
        summed = jax.jit(total)(left, right)
    assert summed.sharding.is_equivalent_to(rules.sharding(mesh, *stored), 2)
    np.testing.assert_array_equal(summed, np.einsum("bti,bto->io", left, right))


@pytest.mark.parametrize("size", [12, 16, 32, 64, 128, 256])
def test_two_stages_leave_each_device_its_own_piece(size):
    columns, rows = collectives._reduce_scatter_stages(size)
    assert columns is not None and rows is not None
    held = {device: list(range(size)) for device in range(size)}  # pieces of the array, in order
    for groups in (columns, rows):
        assert sorted(device for group in groups for device in group) == list(range(size))
        for group in groups:
            for place, device in enumerate(group):
                share = len(held[device]) // len(group)
                held[device] = held[device][place * share : (place + 1) * share]
    assert held == {device: [device] for device in range(size)}


def test_a_prime_number_of_devices_has_one_stage():
    assert collectives._reduce_scatter_stages(13) == [None]

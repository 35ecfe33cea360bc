"""Sums of gradients over devices, against the plain sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.parallel import collectives, rules
from jaxblock.parallel.mesh import make_mesh

USED = ("embed", "heads")
MESHES = [
    ({"fsdp": 8, "data": 1}, ("embed", "heads"), USED),
    ({"fsdp": 4, "data": 2}, ("embed", "heads"), USED),
    ({"fsdp": 4, "data": 1, "tensor": 2}, ("embed", "heads"), USED),
    ({"fsdp": 4, "data": 1, "tensor": 2}, ("adapter", None), ("embed", None)),
    ({"fsdp": 4, "data": 1, "slices": 2}, ("heads", "embed"), ("heads", "embed")),
]


@pytest.mark.parametrize("one_stage", [8, 2])  # 2: four or eight devices sum in two stages, as 16 and more do
@pytest.mark.parametrize(("sizes", "stored", "used"), MESHES)
def test_parts_add_up_to_the_sum_where_the_matrix_is_stored(
    sizes: dict[str, int],
    stored: tuple[str | None, str | None],
    used: tuple[str | None, str | None],
    one_stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collectives, "_SINGLE_STAGE_LIMIT", one_stage)
    mesh = make_mesh(**sizes)
    # Whole numbers: every order of adding gives the same.
    left = jax.random.randint(jax.random.key(0), (16, 3, 8), -9, 9).astype(jnp.float32)
    right = jax.random.randint(jax.random.key(1), (16, 3, 16), -9, 9).astype(jnp.float32)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum("bti,bto->io", a, b)

    with jax.set_mesh(mesh):
        parts = jax.jit(lambda a, b: collectives.partial_sums(product, a, b, used))(left, right)
        summed = jax.jit(lambda parts: collectives.sum_over_devices(parts, used, stored))(parts)
    assert summed.sharding.is_equivalent_to(rules.sharding(mesh, *stored), 2)
    np.testing.assert_array_equal(summed, product(left, right))


@pytest.mark.parametrize("size", [12, 16, 32, 64, 128, 256])
def test_two_stages_leave_each_device_its_own_piece(size: int) -> None:
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


def test_a_prime_number_of_devices_has_one_stage() -> None:
    assert collectives._reduce_scatter_stages(13) == [None]

"""Tests sums over devices, what the processes of a group share (without a group), and what a process leaves to a CPU's host."""

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.errors import UserError
from jaxblock.parallel import collectives, processes, rules
from jaxblock.parallel.host_memory import keep_freed_memory
from jaxblock.parallel.mesh import make_mesh
from jaxblock.parallel.platforms import skip_missing_tpu

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
    held = {device: list(range(size)) for device in range(size)}  # pieces of the array, in order
    for groups in (columns, rows):
        assert sorted(device for group in groups for device in group) == list(range(size))
        for group in groups:
            for place, device in enumerate(group):
                share = len(held[device]) // len(group)
                held[device] = held[device][place * share : (place + 1) * share]
    assert held == {device: [device] for device in range(size)}
    assert collectives._reduce_scatter_stages(13) == [None]  # a prime number has one stage


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("refused", [False, True])
def test_what_process_0_cannot_enter_fails_in_all(monkeypatch, index, refused):
    told: list[str | None] = []

    @contextlib.contextmanager
    def context() -> Iterator[str]:
        if refused:
            raise UserError("held by another")
        yield "held"
        told.append("left")

    def gathered(problem: str | None) -> str | None:
        told.append(problem)
        return "held by another" if refused else None

    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(processes, "first_problem", gathered)
    expected = pytest.raises(UserError, match="held by another") if refused else contextlib.nullcontext()
    with expected, processes.entered_by_first(context) as held:
        assert held == ("held" if index == 0 else None)
    first = ["held by another"] if refused else [None, "left"]
    assert told == (first if index == 0 else [None])


# Allocates and frees 64 MiB in a fresh process; prints how many pages the second time faults in.
AGAIN = """
import ctypes, resource, sys
from jaxblock.parallel.host_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory({"JAX_PLATFORMS": "cpu"}):
    sys.exit(3)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def _faults(mode):
    done = subprocess.run([sys.executable, "-c", AGAIN, mode], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("this C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_freed_block_is_used_again_without_faults():
    assert _faults("keep") < 100 < _faults("leave")
    # Accelerators and people's own settings are left alone.
    for variables in ({"JAX_PLATFORMS": "tpu,cpu"}, {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}):
        assert not keep_freed_memory(variables)


@pytest.mark.parametrize(
    ("installed", "variables", "device", "skipped"),
    [
        ({"libtpu"}, {}, None, True),
        ({"libtpu"}, {"JAX_PLATFORMS": ""}, None, True),
        (set(), {}, None, False),
        ({"libtpu", "jax_plugins"}, {}, None, False),
        ({"libtpu"}, {"JAX_PLATFORMS": "tpu"}, None, False),
        ({"libtpu"}, {"TPU_WORKER_ID": "0"}, None, False),
        ({"libtpu"}, {}, "accel0", False),
        ({"libtpu"}, {}, "vfio/0", False),
    ],
)
def test_libtpu_is_left_out_only_where_there_is_no_tpu(installed, variables, device, skipped, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    if device:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    assert skip_missing_tpu(found := dict(variables), tmp_path) == skipped
    assert found == ({"JAX_PLATFORMS": "cpu"} if skipped else variables)

"""Tests sums over devices, what the processes of a group share (without a group), and what a process leaves to a CPU's host."""

import contextlib
import ctypes
import importlib.util
import math
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

USED = ("embed", "heads")
MESHES = [
    ({"fsdp": 8, "data": 1}, USED, USED, 8),
    ({"fsdp": 8, "data": 1}, USED, USED, 2),
    ({"fsdp": 6, "data": 1}, USED, USED, 2),
    ({"fsdp": 3, "data": 1}, USED, USED, 2),  # a prime number
    ({"fsdp": 4, "data": 2}, USED, USED, 2),
    ({"fsdp": 4, "data": 1, "tensor": 2}, USED, USED, 2),
    ({"fsdp": 4, "data": 1, "tensor": 2}, ("adapter", None), ("embed", None), 8),
    ({"fsdp": 4, "data": 1, "slices": 2}, ("heads", "embed"), ("heads", "embed"), 2),
]
"""Sizes, how the matrix is stored and used, and how many devices sum in one stage: with 2, four or more take two stages."""


@pytest.mark.parametrize(("sizes", "stored", "used", "one_stage"), MESHES)
def test_parts_add_up_to_the_sum_where_the_matrix_is_stored(sizes, stored, used, one_stage, monkeypatch):
    monkeypatch.setattr(collectives, "_SINGLE_STAGE_LIMIT", one_stage)
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    # Whole numbers: every order of adding gives the same.
    left, right = np.random.default_rng(0).integers(-9, 10, (2, 24, 3, 24)).astype(np.float32)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum("bti,bto->io", a, b)

    def total(a: jax.Array, b: jax.Array) -> jax.Array:
        return collectives.sum_over_devices(collectives.partial_sums(product, a, b, used), used, stored)

    with jax.set_mesh(mesh):
        summed = jax.jit(total)(left, right)
    assert summed.sharding.is_equivalent_to(rules.sharding(mesh, *stored), 2)
    np.testing.assert_array_equal(summed, np.einsum("bti,bto->io", left, right))


@pytest.mark.parametrize(
    ("index", "problem", "told"),
    [(0, None, [None, "left"]), (1, None, [None]), (0, "it is held", ["it is held"]), (1, "it is held", [None])],
)
def test_what_process_0_cannot_enter_fails_in_all(monkeypatch, index, problem, told):
    seen: list[str | None] = []

    @contextlib.contextmanager
    def context() -> Iterator[str]:
        if problem:
            raise UserError(problem)
        yield "held"
        seen.append("left")

    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(processes, "first_problem", lambda found: seen.append(found) or problem)
    expected = pytest.raises(UserError, match=problem) if problem else contextlib.nullcontext()
    with expected, processes.entered_by_first(context) as held:
        assert held == ("held" if index == 0 else None)
    assert seen == told


# Allocates and frees 64 MiB in a fresh process; prints how many pages the second time faults in.
AGAIN = """
import ctypes, resource, sys
from jaxblock.parallel.host_memory import keep_freed_memory
assert sys.argv[1] == "leave" or keep_freed_memory({"JAX_PLATFORMS": "cpu"})
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


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_a_freed_block_is_used_again_without_faults():
    keep, leave = (int(subprocess.check_output([sys.executable, "-c", AGAIN, mode])) for mode in ("keep", "leave"))
    assert keep < 100 < leave
    # Accelerators and people's own settings are left alone.
    for variables in ({"JAX_PLATFORMS": "tpu,cpu"}, {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}):
        assert not keep_freed_memory(variables)


@pytest.mark.parametrize(
    ("installed", "variables", "device", "skipped"),
    [
        ({"libtpu"}, {}, None, True),
        ({"libtpu"}, {"JAX_PLATFORMS": ""}, None, True),
        ({"libtpu"}, {"TPU_SKIP_MDS_QUERY": "1", "TPU_ML_PLATFORM_VERSION": "0.10"}, None, True),
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
    assert found == variables | ({"JAX_PLATFORMS": "cpu"} if skipped else {})

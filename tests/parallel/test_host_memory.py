"""Memory that a step frees stays in the process, and libtpu is not started, where the device is a CPU and nobody said otherwise."""

import importlib.util
import subprocess
import sys

import pytest

from jaxblock.parallel.host_memory import keep_freed_memory
from jaxblock.parallel.platforms import skip_missing_tpu

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


@pytest.mark.parametrize(
    "variables", [{"JAX_PLATFORMS": "tpu,cpu"}, {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}], ids=str
)
def test_accelerators_and_own_settings_are_left_alone(variables):
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

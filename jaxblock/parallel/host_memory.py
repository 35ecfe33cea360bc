"""Keeps freed memory in the process where the device is a CPU, because the next step needs as much again."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory(variables: Mapping[str, str] = os.environ) -> bool:
    """Tells glibc not to return freed memory to the kernel, where JAX has no device but the CPU.

    XLA's CPU backend allocates its temporary memory anew at every call, and glibc returns blocks of that size to the
    kernel when they are freed: each train step then faults every page in again (13,000 faults, a quarter of the CPU time
    of the quickstart's step; an eighth at width 512). Call it before JAX starts its threads.

    Args:
        variables: the environment variables; where they set malloc already, nothing is changed.

    Returns:
        Whether anything was changed.
    """
    if not sys.platform.startswith("linux") or _has_accelerator(variables):
        return False
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in variables):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    # Memory is never trimmed and blocks are never mapped. One arena: glibc's further ones are too small for such blocks.
    changed = [mallopt(*setting) for setting in ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1))]
    return all(changed)


def _has_accelerator(variables: Mapping[str, str]) -> bool:
    """Says whether JAX may find an accelerator, without starting JAX, which must come after joining the process group."""
    platforms = variables.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    return any(importlib.util.find_spec(name) is not None for name in ("jax_plugins", "libtpu"))

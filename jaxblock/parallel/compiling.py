"""Chooses how XLA compiles a program for a CPU, so that small networks start sooner."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import jax

EMITTERS = "xla_cpu_use_fusion_emitters"
"""XLA's option of JAX 0.10; later versions have no other code generator for fused operations."""

PIECES = "xla_cpu_parallel_codegen_split_count"
"""XLA's option: into how many pieces a program is cut, to compile them side by side."""

SMALL = 16_000_000
"""A network of up to so many parameters counts as small."""


def quick_options(
    devices: Iterable[jax.Device], parameters: int, variables: Mapping[str, str] = os.environ
) -> dict[str, bool | int]:
    """Returns XLA's options with which a small network's program is compiled in about two thirds of the time on a CPU.

    XLA's older code generator for fused operations is faster itself; its programs differ in the last bits, and are as fast for
    a small network (docs/benchmarks.md). Where this process may use one core only, a program is not cut into pieces, since
    nothing could compile them side by side. Large networks, and other devices, get XLA's defaults.

    Args:
        devices: what the program runs on.
        parameters: how many the network has.
        variables: environment variables. An option that XLA_FLAGS names keeps that value.

    Returns:
        What to pass to ``jax.jit`` as ``compiler_options``.
    """
    if parameters > SMALL or any(device.platform != "cpu" for device in devices):
        return {}
    options: dict[str, bool | int] = {}
    if jax.__version_info__ < (0, 11):
        options[EMITTERS] = False
    if _usable_cores() == 1:
        options[PIECES] = 1
    return {name: value for name, value in options.items() if name not in variables.get("XLA_FLAGS", "")}


def _usable_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

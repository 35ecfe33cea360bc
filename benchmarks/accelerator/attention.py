"""The item that compares the platform's fused attention with XLA's: time and error, forward and backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.accelerator import internals
from benchmarks.accelerator.device_items import Context
from benchmarks.accelerator.internals import Architecture, Backend
from benchmarks.accelerator.measure import Row, Rows, Skip, attempt, spread, timed
from benchmarks.accelerator.sizes import Canvas, Sizes

KERNELS = ("cudnn$fmha", "tpu_custom_call")
"""How the fused kernels are called in a program: cuDNN's, and any Pallas kernel on a TPU."""


def attention(context: Context) -> Rows:
    """Measures each backend on the shapes of the LoRA steps, on one device."""
    sizes = context.sizes
    arch = internals.architecture(sizes, internals.config(sizes, sizes.short))
    device = jax.local_devices()[0]
    fused = internals.backend_of(device.platform)
    with jax.default_device(device):
        for canvas in (sizes.short, sizes.long):
            case = f"{canvas.rows} rows of {canvas.length}, {arch.n_heads} heads of {arch.head_dim}, bfloat16"
            yield attempt(f"{case}: xla", partial(_measure, "xla", arch, canvas, sizes))
            yield attempt(f"{case}: fused", partial(_measure_fused, fused, arch, canvas, sizes))


def _measure_fused(backend: Backend, arch: Architecture, canvas: Canvas, sizes: Sizes) -> Row:
    if backend == "xla":
        raise Skip("there is no fused attention for this platform: cuDNN's is for NVIDIA GPUs, Splash for TPUs")
    q, k, v, _, length = _inputs(arch, canvas)
    text = _programs(backend)[0].lower(q, k, v, length).as_text()
    kernel = "yes" if any(name in text for name in KERNELS) else "no"
    return {"backend": backend, "its kernel is in the program": kernel, **_measure(backend, arch, canvas, sizes)}


def _measure(backend: Backend, arch: Architecture, canvas: Canvas, sizes: Sizes) -> Row:
    """Times a backend on whole batches, and compares its last row, a quarter of whose keys are hidden, with the oracle's."""
    q, k, v, towards, length = _inputs(arch, canvas)
    forward, backward = _programs(backend)
    row: Row = {
        "forward, s": spread(timed(lambda: forward(q, k, v, length), sizes.repeats, sizes.seconds)),
        "forward and backward, s": spread(
            timed(lambda: backward(q, k, v, length, towards), sizes.repeats, sizes.seconds)
        ),
    }
    last = [x[-1:] for x in (q, k, v)]
    wide = [x.astype(jnp.float32) for x in last]
    oracle_forward, oracle_backward = _programs("reference")
    row["error, forward"] = _error(forward(*last, length[-1:]), oracle_forward(*wide, length[-1:]))
    found = backward(*last, length[-1:], towards[-1:])
    wanted = oracle_backward(*wide, length[-1:], towards[-1:])
    for name, got, want in zip("qkv", found, wanted, strict=True):
        row[f"error, gradient of {name}"] = _error(got, want)
    return row


def _inputs(arch: Architecture, canvas: Canvas) -> tuple[Array, Array, Array, Array, Array]:
    """Makes queries, keys, values, the cotangent of the result, and the visible keys: all, but three quarters in the last row."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (arch.n_heads, arch.n_kv_heads, arch.n_kv_heads, arch.n_heads)
    made = [
        jax.random.normal(key, (canvas.rows, canvas.length, count, arch.head_dim), jnp.bfloat16)
        for key, count in zip(keys, heads, strict=True)
    ]
    length = jnp.full(canvas.rows, canvas.length, jnp.int32).at[-1].set(canvas.length * 3 // 4)
    return made[0], made[1], made[2], made[3], length


def _programs(backend: Backend) -> tuple[Any, Any]:
    """Returns the jitted attention, and its jitted gradient by queries, keys and values."""

    def forward(q: Array, k: Array, v: Array, length: Array) -> Array:
        return internals.attend(q, k, v, internals.Mask(length), backend)

    def total(q: Array, k: Array, v: Array, length: Array, towards: Array) -> Array:
        return jnp.sum(forward(q, k, v, length).astype(jnp.float32) * towards.astype(jnp.float32))

    return jax.jit(forward), jax.jit(jax.grad(total, argnums=(0, 1, 2)))


def _error(found: Array, wanted: Array) -> float:
    """Returns the largest difference, relative to the largest wanted value."""
    return float(jnp.abs(found.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max())

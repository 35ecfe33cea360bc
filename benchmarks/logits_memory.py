"""Measures the memory of the logits: a head at the active block against a head at every position, as others have it.

Both programs take the same hidden states of a whole canvas, and return the loss of the active block's masked tokens and
its gradient by the hidden states and the head. Their temporary memory is that of the logits and their gradient.

    python -m benchmarks.logits_memory
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def loss(hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
    """Computes the weighted cross-entropy in float32."""
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * weights)


def active_head(hidden: Array, head: Array, at: Array, targets: Array, weights: Array) -> Array:
    """Computes the loss from the hidden states at the active positions alone."""
    return loss(jnp.take_along_axis(hidden, at[..., None], axis=1), head, targets, weights)


def full_head(hidden: Array, head: Array, at: Array, targets: Array, weights: Array) -> Array:
    """Computes the same loss from logits at every position."""
    everywhere = jnp.zeros(hidden.shape[:2], jnp.int32)
    rows = jnp.arange(hidden.shape[0])[:, None]
    return loss(
        hidden, head, everywhere.at[rows, at].set(targets), jnp.zeros(hidden.shape[:2]).at[rows, at].set(weights)
    )


def temporary_bytes(program: Callable[..., Array], batch: int, width: int, block: int, d: int, vocab: int) -> int:
    """Returns the temporary memory of loss and gradients in bytes, from the compiled program's own analysis."""
    shapes = (
        jax.ShapeDtypeStruct((batch, width, d), jnp.float32),
        jax.ShapeDtypeStruct((d, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, block), jnp.int32),
        jax.ShapeDtypeStruct((batch, block), jnp.int32),
        jax.ShapeDtypeStruct((batch, block), jnp.float32),
    )
    compiled = jax.jit(jax.value_and_grad(program, argnums=(0, 1))).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say how much memory a program takes"
    return memory.temp_size_in_bytes


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the memory of both programs, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 32), ("response", 256), ("block", 32), ("d", 512), ("vocab", 32_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    sizes = (args.batch, args.response, args.block, args.d, args.vocab)
    found = {name: temporary_bytes(program, *sizes) for name, program in (("full", full_head), ("active", active_head))}
    found["ratio"] = found["active"] / found["full"]  # type: ignore[assignment]
    print(f"batch {args.batch}, R {args.response}, block {args.block}, vocabulary {args.vocab:,}, {jax.devices()[0]}")
    print(f"full head    {found['full'] / 2**20:10.1f} MiB")
    print(f"active block {found['active'] / 2**20:10.1f} MiB")
    print(f"ratio        {found['ratio']:10.4f}  (1/{1 / found['ratio']:.1f}; at most 1/6 wanted)")
    return found


if __name__ == "__main__":
    main()

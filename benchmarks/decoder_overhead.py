"""Measures what the decode loop costs: its forwards per second against those of a bare forward of the same shape.

Both run in one process, in turns; the ratio is the median of the pairs' ratios. The bare forward is a jitted call of
hidden states and logits at the active block, with nothing around it.

    python -m benchmarks.decoder_overhead
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.small_network import network, seconds
from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.parallel.host_memory import keep_freed_memory


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Prints the forwards per second of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "d": 512,
        "layers": 8,
        "batch": 4,
        "prompt": 128,
        "response": 128,
        "block": 32,
        "vocab": 32_000,
        "repeat": 5,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    arch, net, params = network(args)
    layout = Layout(args.response, args.block, "same_position", "aligned", None, arch.need_mask_id(), 1, (1,))
    options = DecodeConfig(steps_per_block=args.block, early_stop=False)
    key = jax.random.key(0)
    prompt = jax.random.randint(key, (args.batch, args.prompt), 2, args.vocab - 1)
    row = jnp.arange(args.batch, dtype=jnp.int32)
    canvas = canvases.for_decoding(layout, prompt, jnp.full(args.batch, args.prompt, jnp.int32), row)
    seen = canvases.view(layout, canvas, jnp.zeros_like(row), jnp.full((args.batch, args.block), layout.mask_id))

    whole = jax.jit(decoder.decode, static_argnums=(0, 1, 2))
    bare = jax.jit(lambda params, seen: net.logits(params, net.hidden(params, seen)))
    steps = args.response
    few = max(4, steps // 8)

    def loop() -> Any:
        return whole(net, layout, options, params, canvas, 0)

    def forwards() -> Any:
        for _ in range(few):
            out = bare(params, seen)
        return out

    assert int(loop().nfe[0]) == steps
    jax.block_until_ready(forwards())
    pairs = [(steps / seconds(loop), few / seconds(forwards)) for _ in range(args.repeat)]
    inside, outside = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    spread = ", ".join(f"{a / b:.3f}" for a, b in pairs)
    print(
        f"d {args.d}, {args.layers} layers, batch {args.batch}, canvas {args.prompt + args.response}, block {args.block}"
    )
    print(f"decoder {inside:8.2f} forwards/s\nbare    {outside:8.2f} forwards/s")
    print(f"ratio   {ratio:8.3f}  (at least 0.9 wanted; each pair: {spread})")
    return {"decoder": inside, "bare": outside, "ratio": ratio}


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()

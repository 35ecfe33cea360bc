"""Measures what it brings that a row which has ended gives its place to the next prompt, against decoding batch by batch in order.

The network is real and untrained; only its head is told when to stop: the first token of a prompt says in which block its answer
ends, and the stop token is certain there and impossible before. So the lengths of the answers are known, 1 to 8 of 8 blocks
equally often, in random order. Both sides decode the same prompts, must find the same answers, and take turns; the ratio is the
median of the pairs' ratios.

    python -m benchmarks.decode_queue
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxblock import build
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.queue import Queue
from jaxblock.inference import Costs, DeviceDecoder
from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.spec import init_params
from jaxblock.models.transformer import Transformer
from jaxblock.parallel.host_memory import keep_freed_memory
from jaxblock.types import Params, View

BLOCKS = 8
STOP, FIRST_LENGTH = 1, 2  # ids: the stop token, and the first token of a prompt whose answer has one block


@dataclass(frozen=True, kw_only=True)
class ToldWhenToStop(Transformer):
    """A network whose answers end in the block that the prompt's first token names."""

    layout: Layout

    def hidden(self, params: Params, view: View, row_keys: Array | None = None) -> Array:
        """Returns the network's hidden states; a last channel says whether the block is the last one of its row [B, A, D + 1]."""
        states = super().hidden(params, view, row_keys)
        block = (view.active[:, 0] - (view.length - self.layout.response_len)) // self.layout.block
        last = (block >= view.ids[:, 0] - FIRST_LENGTH).astype(states.dtype)
        return jnp.concatenate([states, jnp.broadcast_to(last[:, None, None], (*states.shape[:2], 1))], axis=-1)

    def logits(self, params: Params, hidden: Array) -> Array:
        """Returns the network's logits, with that of the stop token replaced."""
        return super().logits(params, hidden[..., :-1]).at[..., STOP].set(jnp.where(hidden[..., -1] > 0, 1e4, -1e4))


def in_order(run: Callable[..., decoder.Responses], params: Params, prompts: np.ndarray, size: int) -> np.ndarray:
    """Decodes batch by batch, each until its last row has ended, and returns the responses [N, R]."""
    found = []
    for at in range(0, len(prompts), size):
        part = prompts[at : at + size]
        lengths, index = np.full(size, prompts.shape[1], np.int32), np.arange(at, at + size, dtype=np.int32)
        found.append(jax.device_get(run(params, 0, part, lengths, index).response))
    return np.concatenate(found)


def queued(
    net: Transformer, layout: Layout, options: DecodeConfig, params: Params, prompts: np.ndarray
) -> tuple[np.ndarray, Costs]:
    """Decodes through the queue, and returns the responses [N, R] and what was computed for them."""
    device = DeviceDecoder(net, layout, options, params, prompt_len=prompts.shape[1], rows=len(prompts))
    rows = Queue((device.row(prompt, index) for index, prompt in enumerate(prompts)), device)
    return np.stack([row.response for row in rows]), device.costs


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Returns the wall time of a call, and the processors' time, which does not depend on what else the machine does."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Prints what both computed over what was needed, their times and the ratios of these."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"d": 128, "layers": 4, "vocab": 1000, "prompt": 32, "block": 8, "steps": 4}
    for name, default in {**sizes, "problems": 512, "batch": 64, "repeat": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    if args.problems % args.batch:
        parser.error("--problems must be a multiple of --batch, so that batches in order are full")
    settings = ModelConfig(d_model=args.d, n_layers=args.layers, n_heads=4, mlp_dim=args.d * 8 // 3 // 8 * 8)
    arch = registry.architecture_from_config(settings, vocab_size=args.vocab, mask_id=args.vocab - 1, eos_id=STOP)
    layout = Layout(
        BLOCKS * args.block, args.block, "same_position", "aligned", None, arch.need_mask_id(), STOP, (STOP,)
    )
    plain = build.network(arch, settings)
    net = ToldWhenToStop(**{each.name: getattr(plain, each.name) for each in fields(plain)}, layout=layout)
    params = init_params(net.param_table, 0, "float32")
    options = DecodeConfig(steps_per_block=args.steps, batch_size=args.batch)
    random = np.random.default_rng(0)
    prompts = random.integers(FIRST_LENGTH + BLOCKS, args.vocab - 1, (args.problems, args.prompt), dtype=np.int32)
    lengths = random.permutation(np.arange(args.problems, dtype=np.int32) % BLOCKS) + 1
    prompts[:, 0] = FIRST_LENGTH + lengths - 1
    run = partial(jax.jit(decoder.decode_prompts, static_argnums=(0, 1, 2)), net, layout, options.static(layout.block))

    def batches() -> np.ndarray:
        return in_order(run, params, prompts, args.batch)

    def queue() -> tuple[np.ndarray, Costs]:
        return queued(net, layout, options, params, prompts)

    found, costs = queue()
    np.testing.assert_array_equal(found, batches())
    assert ((found == STOP).argmax(axis=1) // args.block + 1 == lengths).all()
    pairs = [(seconds(batches), seconds(queue)) for _ in range(args.repeat)]
    print(
        f"{args.problems} prompts of {args.prompt}, answers of 1 to {BLOCKS} blocks of {args.block}, batch {args.batch}, "
        f"{args.steps} steps a block, d {args.d}, {args.layers} layers"
    )
    print(f"in order: blocks of rows computed over needed {args.problems * BLOCKS / lengths.sum():.2f}")
    print(f"queue: {costs}")
    ratios = {}
    for at, kind in enumerate(("wall", "processor")):
        before, after = (statistics.median(pair[side][at] for pair in pairs) for side in (0, 1))
        each = [one[at] / other[at] for one, other in pairs]
        ratios[kind] = statistics.median(each)
        shown = ", ".join(f"{ratio:.2f}" for ratio in each)
        print(f"{kind:9} in order {before:7.2f} s, queue {after:7.2f} s, ratio {ratios[kind]:.2f} (each pair: {shown})")
    return {**ratios, "computed": costs.ratios()[0]}


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()

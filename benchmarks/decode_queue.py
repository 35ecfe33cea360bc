"""Measures what it brings that a row which has ended gives its place to the next prompt, against decoding batch by batch in order.

A model is trained first, through the verbs, on questions whose answers have 1 to 8 of 8 blocks, equally often; nothing in a question
tells how many, so that the model draws answers of random length. Both sides then decode the same prompts of its test split, must
find the same answers, and take turns; the ratio is the median of the pairs' ratios.

    python -m benchmarks.decode_queue
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

import jaxblock
from jaxblock import cli
from jaxblock.data.store.records import Records
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.queue import Queue
from jaxblock.inference import Costs, DeviceDecoder
from jaxblock.models.transformer import Transformer
from jaxblock.parallel.host_memory import keep_freed_memory
from jaxblock.types import Params

BLOCKS = 8
CONFIG = """\
data: {{prepared: {0}/prepared, train: {0}/train.jsonl, test: {0}/test.jsonl, validation_records: 8, template: plain,
       tokenizer_type: char, vocab_size: 300}}
canvas: {{prompt_len: 32, response_len: {response}, block: {block}}}
model: {{d_model: {d}, n_layers: {layers}, n_heads: 4, mlp_dim: {mlp}, tie_embeddings: true}}
optimizer: {{lr: {lr}, warmup_steps: 10}}
train: {{out: {0}/run, steps: {train}, batch_size: 32, log_every: 50, eval_every: 0}}
"""


def trained(folder: Path, args: argparse.Namespace) -> jaxblock.Model:
    """Trains a model on questions that do not tell how long their answers are: 1 to 8 blocks, the last of them less one character."""
    lengths = args.block * (1 + np.random.default_rng(0).permutation(np.arange(2 * args.problems) % BLOCKS)) - 1
    for first, name in enumerate(("train", "test")):
        numbers = range(first, 2 * args.problems, 2)
        rows = [json.dumps({"question": f"{n}?", "answer": "a" * lengths[n]}) for n in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    sizes = {"response": BLOCKS * args.block, "mlp": args.d * 8 // 3 // 8 * 8, **vars(args)}
    (folder / "config.yaml").write_text(CONFIG.format(folder, **sizes))
    for verb in ("prepare", "train"):
        if code := cli.main([verb, "--config", str(folder / "config.yaml")]):
            raise SystemExit(code)
    return jaxblock.load(folder / "run")


def in_order(
    run: Callable[..., decoder.Responses], params: Params, prompts: Sequence[np.ndarray], room: int, size: int
) -> np.ndarray:
    """Decodes batch by batch, each until its last row has ended; canvases have ``room`` for a prompt. Returns the responses [N, R]."""
    found = []
    for at in range(0, len(prompts), size):
        part = prompts[at : at + size]
        ids = np.stack([np.pad(prompt, (0, room - len(prompt))) for prompt in part]).astype(np.int32)
        lengths, index = np.array([len(prompt) for prompt in part], np.int32), np.arange(at, at + size, dtype=np.int32)
        found.append(jax.device_get(run(params, 0, ids, lengths, index).response))
    return np.concatenate(found)


def queued(
    net: Transformer, layout: Layout, options: DecodeConfig, params: Params, prompts: Sequence[np.ndarray], room: int
) -> tuple[np.ndarray, Costs]:
    """Decodes through the queue, and returns the responses [N, R] and what was computed for them."""
    device = DeviceDecoder(net, layout, options, params, prompt_len=room, rows=len(prompts))
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
    sizes = {"d": 128, "layers": 4, "block": 8, "steps": 4, "train": 200, "problems": 512, "batch": 64, "repeat": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3, help="the learning rate of the training before")
    args = parser.parse_args(argv)
    if args.problems % args.batch:
        parser.error("--problems must be a multiple of --batch, so that batches in order are full")
    with tempfile.TemporaryDirectory() as folder:
        model = trained(Path(folder), args)
        prompts = [record.prompt_ids for record in Records(Path(folder) / "prepared", "test")]
    options = DecodeConfig(steps_per_block=args.steps, batch_size=args.batch, temperature=1.0)
    layout, room = model.layout(options), model.canvas.prompt_len
    run = jax.jit(partial(decoder.decode_prompts, model.net, layout, options.static(layout.block)))

    def batches() -> np.ndarray:
        return in_order(run, model.params, prompts, room, args.batch)

    def queue() -> tuple[np.ndarray, Costs]:
        return queued(model.net, layout, options, model.params, prompts, room)

    found, costs = queue()
    np.testing.assert_array_equal(found, batches())
    ends = np.isin(found, layout.stop_ids)
    blocks = np.where(ends.any(axis=1), ends.argmax(axis=1) // args.block + 1, BLOCKS)
    pairs = [(seconds(batches), seconds(queue)) for _ in range(args.repeat)]
    print(
        f"{args.problems} prompts, answers of 1 to {BLOCKS} blocks of {args.block} ({np.bincount(blocks)[1:]} of each), "
        f"batch {args.batch}, {args.steps} steps a block, d {args.d}, {args.layers} layers"
    )
    print(
        f"in order: blocks of rows computed over needed {blocks.reshape(-1, args.batch).max(axis=1).sum() * args.batch / blocks.sum():.2f}"
    )
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

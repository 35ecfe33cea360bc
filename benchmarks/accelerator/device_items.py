"""The items that run the model on the device: parity, weights, LoRA steps, decoding, checkpoints."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

import jaxblock
from benchmarks.accelerator import internals
from benchmarks.accelerator.internals import Decoding, LoraRun, Planned
from benchmarks.accelerator.measure import Row, Rows, Skip, attempt, gib, rates, spread, timed
from benchmarks.accelerator.sizes import Canvas, Sizes


class Context(NamedTuple):
    """What an item is given.

    Attributes:
        sizes: what is measured.
        out: a folder for the item's own files.
        golden: the folder of the golden models.
        seconds: the time that it may take.
    """

    sizes: Sizes
    out: Path
    golden: Path
    seconds: float


def parity(context: Context) -> Rows:
    """Compares the golden models' float32 logits with the oracle's, under two ambient precisions.

    The library states the precision of its float32 products itself, so the ambient one (which on a GPU or TPU would be TF32
    or bfloat16 by default) must not matter.
    """
    if not context.golden.is_dir():
        raise Skip(f"there are no golden models at {context.golden}: name their folder with --golden")
    for folder in sorted(path.parent for path in context.golden.glob("*/oracle.npz")):
        yield attempt(folder.name, partial(_differences, folder))


def _differences(folder: Path) -> Row:
    try:
        model = jaxblock.load(folder)
    except jaxblock.UserError as error:
        raise Skip(str(error)) from error
    oracle, found = dict(np.load(folder / "oracle.npz")), {}
    for ambient in ("default", "highest"):
        with jax.default_matmul_precision(ambient):
            paddings = [padding for padding in ("", "leftpad_", "rightpad_") if f"{padding}input_ids" in oracle]
            found[f"ambient precision {ambient}"] = max(_difference(model, oracle, padding) for padding in paddings)
    return {**found, "within 2e-5": "yes" if max(found.values()) <= 2e-5 else "no"}


def _difference(model: jaxblock.Model, oracle: dict[str, np.ndarray], padding: str) -> float:
    """Returns the largest difference at a real token, relative to the largest logit."""
    ids, want = oracle[f"{padding}input_ids"], oracle[f"{padding}logits"]
    real = oracle.get(f"{padding}attention_mask", np.ones(ids.shape)).astype(bool)
    got = model.logits(ids, real if padding else None)
    return float(np.abs(got - want)[real].max() / np.abs(want[real]).max())


def weights(context: Context) -> Rows:
    """Times the making of random weights of the model's size."""
    run = LoraRun.of(context.sizes, context.sizes.short)
    make = run.base_maker()
    begin = time.perf_counter()
    base = make()
    first = time.perf_counter() - begin
    made = internals.size(base)
    del base
    again = timed(make, context.sizes.repeats, context.sizes.seconds, warm_up=0)
    yield {
        "case": f"{run.arch.n_layers} layers of width {run.arch.d_model}, {run.preset.model.param_dtype}",
        "parameters": internals.count_params(run.learner.net.param_table),
        "bytes": made,
        "first time, compiling included, s": first,
        "again, s": spread(again),
        "again, GB/s": rates(made / 1e9, again),
        "peak memory, GiB": internals.peak_gib(),
    }


def lora(context: Context) -> Rows:
    """Measures the LoRA step on short sequences."""
    return _lora_step(context.sizes, context.sizes.short)


def lora_long(context: Context) -> Rows:
    """Measures the LoRA step on long sequences."""
    return _lora_step(context.sizes, context.sizes.long)


def int8(context: Context) -> Rows:
    """Measures the LoRA step on short sequences over an int8 base."""
    return _lora_step(context.sizes, context.sizes.short, quantize=True)


def _lora_step(sizes: Sizes, canvas: Canvas, *, quantize: bool = False) -> Rows:
    """Compiles the step by shapes alone, makes the weights only if it fits, and times it."""
    run = LoraRun.of(sizes, canvas, quantize=quantize)
    case = f"{run.preset.train.batch_size} rows of {canvas.length}, rank {run.preset.lora.rank}"
    found = internals.planned(run.lower, (run.shapes.state, run.shapes.frozen))
    yield {"case": f"{case}: planned", **found.plan}
    with jax.set_mesh(run.mesh):
        yield {"case": f"{case}: measured", **_run_steps(run, found, sizes)}


def _run_steps(run: LoraRun, found: Planned, sizes: Sizes) -> Row:
    """Makes the weights and times the compiled step on one batch.

    The device's peak memory counts from the start of the process, so that before the first step is given beside it: where
    both are equal, making the weights took the most.
    """
    base, batch = run.base_maker()(), run.batch()
    state = jax.block_until_ready(run.state())
    before, metrics = internals.peak_gib(), []

    def step() -> Any:
        nonlocal state
        state, of_this_step = found.run(state, batch, base)
        metrics.append(of_this_step)
        return of_this_step

    times = timed(step, sizes.repeats, sizes.seconds, warm_up=2)
    flops, peak, used = run.flops(), run.peak_flops(), internals.peak_gib()
    loss = metrics[-1].losses.loss
    return {
        "devices": run.mesh.size,
        "base, bytes": internals.size(base),
        "step, s": spread(times),
        "tokens/s": rates(run.tokens, times),
        "model TFLOP/s": rates(flops / 1e12, times),
        "MFU (of the published bf16 peak)": None if peak is None else rates(flops / peak, times),
        "peak memory before the first step, GiB": before,
        "peak memory, GiB": used,
        "peak memory over the plan": None if used is None else used / found.gib,
        "loss": float(loss.total / loss.weight),
        "steps whose loss or gradient was not finite": sum(bool(one.skipped) for one in metrics),
    }


def decode(context: Context) -> Rows:
    """Measures the decoder at several batch sizes."""
    decoding = Decoding.of(context.sizes)
    with jax.set_mesh(decoding.mesh):
        for rows in context.sizes.batches:
            yield attempt(f"batch {rows}", partial(_decode, decoding, rows, context.sizes))


def _decode(decoding: Decoding, rows: int, sizes: Sizes) -> Row:
    found, call = decoding.program(rows)
    forwards = int(np.max(call().nfe))  # this call is the warm-up
    times = timed(call, sizes.repeats, sizes.seconds, warm_up=0)
    canvas, chip, count = sizes.decoding, internals.chip_of(jax.local_devices()[0]), decoding.mesh.size
    speed = rates(forwards, times)
    row: Row = {
        "canvas": f"{canvas.prompt} + {canvas.response}, blocks of {canvas.block}",
        "forwards": forwards,
        **found.plan,
        "tokens/s": rates(rows * canvas.response, times),
        "forwards/s": speed,
        "weights read by a forward, bytes": decoding.bytes_read(),
        "peak memory so far, GiB": internals.peak_gib(),
    }
    if chip is None or chip.bandwidth is None or chip.flops is None:
        return {**row, "limits": "no published bandwidth and peak of this device are known"}
    by_memory = count * chip.bandwidth / decoding.bytes_read()
    by_arithmetic = count * chip.flops / decoding.flops(rows)
    return {
        **row,
        "limit by memory bandwidth, forwards/s": by_memory,
        "limit by arithmetic, forwards/s": by_arithmetic,
        "share of the lower limit": speed["median"] / min(by_memory, by_arithmetic),
    }


def decode_caches(context: Context) -> Rows:
    """Measures the decoder without a cache and with each of them, at several batch sizes."""
    decoding = Decoding.of(context.sizes)
    with jax.set_mesh(decoding.mesh):
        for rows in context.sizes.batches:
            for cache in get_args(internals.CacheName):
                yield attempt(
                    f"batch {rows}, cache {cache}", partial(_decode_cached, decoding, rows, cache, context.sizes)
                )


def _decode_cached(decoding: Decoding, rows: int, cache: internals.CacheName, sizes: Sizes) -> Row:
    found, call = decoding.program(rows, cache)
    first, canvas = call(), sizes.decoding  # this call is the warm-up
    times = timed(call, sizes.repeats, sizes.seconds, warm_up=0)
    return {
        "canvas": f"{canvas.prompt} + {canvas.response}, blocks of {canvas.block}",
        "forwards": int(np.max(first.nfe)),
        "token-forwards of a row": int(np.max(first.positions)),
        "positions computed for a row": int(np.max(first.computed)),
        **found.plan,
        "tokens/s": rates(rows * canvas.response, times),
        "token-forwards/s": rates(float(np.sum(first.positions)), times),
        "peak memory so far, GiB": internals.peak_gib(),
    }


def checkpoint(context: Context) -> Rows:
    """Measures saves and restores of the LoRA run's state, which holds the adapters and their moments."""
    run, folder = LoraRun.of(context.sizes, context.sizes.short), context.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with jax.set_mesh(run.mesh):
            yield _save_and_restore(run, folder, context.sizes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save_and_restore(run: LoraRun, folder: Path, sizes: Sizes) -> Row:
    state = jax.block_until_ready(run.state())
    amount = internals.size(state) / 1e9
    kept, whole, back = [], [], []
    saver = internals.CheckpointWriter(folder, internals.Keep(1))
    # The first save compiles the check for NaN, so it is not counted.
    for step in range(1, 2 + min(sizes.repeats, 3)):
        begin = time.perf_counter()
        saver.save(state, step, {})
        kept.append(time.perf_counter() - begin)
        saver.wait()
        whole.append(time.perf_counter() - begin)
    saver.close()
    if saver.failed is not None:
        raise RuntimeError(f"the checkpoint of step {saver.failed} was not written")
    del state
    for _ in range(min(sizes.repeats, 3)):
        begin = time.perf_counter()
        reader = internals.CheckpointReader(folder)
        restored = jax.block_until_ready(reader.restore(step, run.shapes.state))
        back.append(time.perf_counter() - begin)
        reader.close()
        del restored
    return {
        "case": "adapters and moments of the short LoRA run",
        "GB": amount,
        "training stands still for a save, s": spread(kept[1:]),
        "save until it is whole, s": spread(whole[1:]),
        "save, GB/s": rates(amount, whole[1:]),
        "restore with checksums, files perhaps still in memory, s": spread(back),
        "restore, GB/s": rates(amount, back),
        "free on this disk, GiB": gib(shutil.disk_usage(folder).free),
    }

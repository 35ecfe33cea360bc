"""Measures where a train step's time goes: each of its parts alone, and the step with its layers scanned and unrolled.

The parts are one layer's products (as plain products, and with our backward pass), its attention, its norms and rotary
positions, the whole layer, the head, the embedding, and the optimizer. Each is compiled and run by itself; its time, multiplied by
how often the step runs it, is compared with the step's. What the parts' sum leaves is what the step adds: slices of stacked
weights, stacked gradients, and whatever XLA does worse in one large program.

All programs take turns, and medians are printed: other work on the machine then slows all of them alike.

    python -m benchmarks.step_profile
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxblock import build
from jaxblock.config.config import Config
from jaxblock.data.loader import Batch
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.models.attention.backends import attend
from jaxblock.models.attention.mask import Mask
from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.layers import rms_norm
from jaxblock.models.linear.dense import dense
from jaxblock.models.linear.fsdp import Split
from jaxblock.models.numerics import look_up
from jaxblock.models.rotary import compute_rotation, rotate
from jaxblock.models.spec import init_params
from jaxblock.models.transformer import Transformer
from jaxblock.parallel.host_memory import keep_freed_memory
from jaxblock.training.config import TrainConfig
from jaxblock.training.optim.precision import global_norm
from jaxblock.training.step import Learner, gradients

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class Part(NamedTuple):
    """Holds a program to measure.

    Attributes:
        run: the compiled program.
        times: how often a step runs it; 0 for what is only compared.
        flops: the operations of its products.
    """

    run: Callable[[], Any]
    times: int
    flops: float = 0.0


def settings(args: argparse.Namespace) -> Config:
    """Returns the config of the measured step."""
    half = args.canvas // 2
    heads = {"n_heads": 8, "mlp_dim": args.d * 8 // 3 // 8 * 8}
    return Config(
        canvas=CanvasConfig(half, args.canvas - half, args.block),
        model=ModelConfig(d_model=args.d, n_layers=args.layers, **heads),
        train=TrainConfig(batch_size=args.batch),
    )


def compiled(f: Callable[..., Any], *given: Any) -> Callable[[], Any]:
    """Compiles a function for its arguments, and returns the call."""
    program = jax.jit(f).lower(*given).compile()
    return lambda: program(*given)


def both_ways(f: Callable[..., Any], *given: Any, fixed: tuple[Any, ...] = ()) -> Callable[[], Any]:
    """Compiles a function with its gradient for ``given``, and returns the call; ``fixed`` are more arguments.

    What the gradient begins with is an argument too, since the compiler would compute with constants.
    """

    def both(seeds: Any, given: Any, fixed: Any) -> Any:
        results, back = jax.vjp(lambda *given: f(*given, *fixed), *given)
        return results, back(seeds)

    seeds = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), jax.eval_shape(f, *given, *fixed))
    return compiled(both, seeds, given, fixed)


def layer_parts(net: Transformer, layer: Any, batch: int, width: int) -> dict[str, Part]:
    """Returns the parts of one layer, forward and backward."""
    arch, n = net.arch, net.arch.n_layers
    x = jax.random.normal(jax.random.key(0), (batch, width, arch.d_model))
    inputs = [x if name != "down" else jnp.ones((batch, width, arch.mlp_dim)) for name in MATRICES]
    weights = [layer[name] for name in MATRICES]
    flops = 2.0 * batch * width * sum(w.size for w in weights)
    heads = x.reshape(batch, width, arch.n_heads, -1)
    mask, positions = Mask(jnp.full(batch, width)), jnp.broadcast_to(jnp.arange(width), (batch, width))
    split = Split((None, None), (None, None))

    def products(split: Split | None, inputs: Any, weights: Any) -> Any:
        return [dense(each, w, split=split) for each, w in zip(inputs, weights, strict=True)]

    def norms(x: Any, scale: Any, heads: Any) -> Any:
        rotation = compute_rotation(positions, arch, net.dtype)
        return (
            rms_norm(x, scale, 1e-5),
            rms_norm(x + 1, scale, 1e-5),
            rotate(heads, rotation),
            rotate(heads + 1, rotation),
        )

    whole = build_layer(net, mask, positions)
    attention = 4.0 * batch * width * width * arch.d_model
    plain, ours = functools.partial(products, None), functools.partial(products, split)
    return {
        "products, forward": Part(compiled(plain, inputs, weights), n, flops),
        "products, both": Part(both_ways(plain, inputs, weights), 0, 3 * flops),
        "products, both, our backward": Part(both_ways(ours, inputs, weights), 0, 3 * flops),
        "attention, both": Part(
            both_ways(lambda q, k, v: attend(q, k, v, mask, net.attention), heads, heads, heads),
            0, 3 * attention,
        ),
        "norms and rotary, both": Part(both_ways(norms, x, layer["attn_norm"], heads), 0),
        "layer, forward": Part(compiled(whole, x, layer), 0, flops + attention),
        "layer, both": Part(both_ways(whole, x, layer), n, 3 * (flops + attention)),
    }  # fmt: skip


def build_layer(net: Transformer, mask: Mask, positions: Any) -> Callable[..., Any]:
    """Returns a function of (residual stream, one layer's weights) that computes one layer."""
    rotation = compute_rotation(positions, net.arch, net.dtype)
    return lambda x, own: net._with_params(own)(x, rotation, mask, {})[0]


def other_parts(learner: Learner, params: Any, batch: int, width: int, active: int) -> dict[str, Part]:
    """Returns what a step computes once: head and loss, embedding, optimizer."""
    net = learner.net
    hidden = jax.random.normal(jax.random.key(1), (batch, active, net.arch.d_model))
    targets = jnp.ones((batch, active), jnp.int32)
    ids = jax.random.randint(jax.random.key(2), (batch, width), 0, net.arch.vocab_size)
    state, grads = jax.jit(learner.optimizer.init)(params), jax.tree.map(jnp.ones_like, params)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = learner.optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, global_norm(grads)

    flops = 6.0 * hidden.size * net.arch.vocab_size

    def head(w: Any, h: Any, targets: Any) -> Any:
        return net.nll({"head": w}, h, targets)

    return {
        "head and loss, both": Part(both_ways(head, params["head"], hidden, fixed=(targets,)), 1, flops),
        "embedding, both": Part(both_ways(lambda w, ids: look_up(w, ids, net.dtype), params["embed"], fixed=(ids,)), 1),
        "optimizer": Part(compiled(update, grads, state, params), 1),
    }


def whole_steps(learner: Learner, params: Any, batch: Batch, unrolls: Sequence[int], flops: float) -> dict[str, Part]:
    """Returns the gradients of a step, with layers unrolled and scanned, some layers per round of the scan."""
    found = {}
    for unroll in (0, *unrolls):
        objective = learner.objective.at_widths((), scan_layers=unroll > 0)
        with mock.patch.object(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=max(unroll, 1))):
            run = compiled(lambda p, b, o=objective: gradients(o, p, b, jnp.int32(0))[1], params, batch)
        found["gradient, layers unrolled" if not unroll else f"gradient, layers scanned by {unroll}"] = Part(
            run, 0, flops
        )
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Prints a table of the parts; returns the median seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"d": 512, "layers": 8, "canvas": 256, "block": 32, "vocab": 32_000, "batch": 4, "repeat": 15}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--unroll", type=int, nargs="*", default=[1], help="layers per round of the scan")
    args = parser.parse_args(argv)
    config = settings(args)
    arch = registry.architecture_from_config(config.model, vocab_size=args.vocab, mask_id=args.vocab - 1, eos_id=1)
    learner = build.learner(config, arch, (1,))
    params = init_params(learner.net.param_table, 0, "float32")
    layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    batch, rows = args.batch, np.arange(args.batch, dtype=np.int32)
    ids = np.random.default_rng(0).integers(2, args.vocab - 1, (2, batch, args.canvas // 2), dtype=np.int32)
    full = np.full(batch, args.canvas // 2, np.int32)
    parts = layer_parts(learner.net, layer, batch, args.canvas) | other_parts(
        learner, params, batch, args.canvas, args.block
    )
    total = sum(parts[name].flops * parts[name].times for name in ("layer, both", "head and loss, both"))
    whole = Batch(ids[0], full, ids[1], full, np.zeros(batch, np.int32), rows, rows)
    parts |= whole_steps(learner, params, whole, args.unroll, total)
    medians = measure(parts, args.repeat)
    gradient = medians["gradient, layers scanned by 1"] if 1 in args.unroll else medians["gradient, layers unrolled"]
    print(f"{args}\n{'part':34}{'ms':>9}{'a step':>8}{'of gradient':>12}{'GFLOP/s':>9}")
    for name, part in parts.items():
        share = f"{part.times * medians[name] / gradient:11.0%}" if part.times else ""
        speed = f"{part.flops / medians[name] / 1e9:9.1f}" if part.flops else ""
        print(f"{name:34}{medians[name] * 1e3:9.2f}{part.times or '':>8}{share:>12}{speed:>9}")
    return medians


def measure(parts: dict[str, Part], repeat: int) -> dict[str, float]:
    """Runs all programs in turns, and returns the median seconds of each."""
    found: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(repeat + 1):
        for name, part in parts.items():
            begin = time.perf_counter()
            jax.block_until_ready(part.run())
            if turn:  # the first turn warms up
                found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()

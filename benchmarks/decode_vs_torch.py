"""Compares decoding with PyTorch: jaxblock's decoder against ``torch_decoder``, without a cache and with both caches.

Both sides get the same weights (random, float32) and prompts, commit the same quota of tokens at each step, and run on all
cores. The script first checks that they decode the same tokens without a cache, that both spend the forward
passes and token-forwards (positions fed to the network) of the closed form, and says how many tokens agree with each cache:
a cached pass adds in another order, so a token that is nearly as probable as another may change. Then all contestants take
turns; a ratio is the median over the rounds. PyTorch computes logits at the block, as jaxblock does; with ``--head all`` at
every position that is fed, as the published scripts do.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.decode_vs_torch
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import torch_decoder
from benchmarks.small_network import CACHES, VARIED, network, random_prompts, seconds, sizes_parser, token_forwards
from benchmarks.step_profile import MATRICES
from jaxblock.diffusion.canvas import Layout, for_decoding
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import CacheName, DecodeConfig
from jaxblock.parallel.host_memory import keep_freed_memory


class Case(NamedTuple):
    """What is decoded: a number of prompts, with a cache."""

    rows: int
    cache: CacheName


class Sides(NamedTuple):
    """Holds the decoders of a case, or their times in seconds, round by round."""

    ours: Any
    torch: Any


def checked_decoders(args: Namespace) -> dict[Case, Sides]:
    """Returns both decoders of every case; each has run once, and they did the same job."""
    arch, net, params = network(args, VARIED)
    theirs = torch_decoder.Network(arch, net.param_table, params)
    layout = Layout(args.response, args.block, "same_position", "aligned", None, arch.need_mask_id(), 1, (1,))
    compiled = jax.jit(decoder.decode, static_argnums=(0, 1, 2))
    found = {}
    for case in (Case(rows, cache) for rows in args.batch for cache in CACHES):
        prompts = random_prompts(args, case.rows)
        lengths, row_ids = jnp.full(case.rows, args.prompt, jnp.int32), jnp.arange(case.rows, dtype=jnp.int32)
        canvas = for_decoding(layout, jnp.asarray(prompts), lengths, row_ids)
        ours = DecodeConfig(steps_per_block=args.steps, early_stop=False, cache=case.cache).static(args.block)
        options = torch_decoder.Options(args.response, args.block, args.steps, case.cache, head=args.head)
        ids = torch.from_numpy(prompts).long()
        sides = Sides(
            lambda ours=ours, canvas=canvas: compiled(net, layout, ours, params, canvas, 0),
            lambda options=options, ids=ids: torch_decoder.decode(theirs, options, ids),
        )
        _check(case, sides, args)
        found[case] = sides
    return found


def _check(case: Case, sides: Sides, args: Namespace) -> None:
    """Asserts that both sides do the same job, and prints how much of it has the same result."""
    ours, theirs = sides.ours(), sides.torch()
    expected = token_forwards(case.cache, args.prompt, args.response, args.block, args.steps)
    forwards = args.response // args.block * args.steps
    fed = sum(one.end - one.begin for one in theirs.forwards)
    assert np.all(np.asarray(ours.nfe) == forwards) and len(theirs.forwards) == forwards, (ours.nfe, theirs.forwards)
    assert np.all(np.asarray(ours.positions) == expected) and fed == expected, (ours.positions, fed, expected)
    same = float(np.mean(np.asarray(ours.response) == theirs.ids[:, args.prompt :].numpy()))
    assert case.cache != "none" or same == 1, f"without a cache only {same:.1%} of the tokens agree"
    print(
        f"batch {case.rows}, cache {case.cache:6}: {same:.1%} of the tokens agree; a row takes {forwards} forwards, "
        f"{expected:,} token-forwards, and jaxblock computes {int(ours.computed[0]):,} positions"
    )


def step_products(args: Namespace, rows: int) -> Sides:
    """Returns the matrix products of a step beside the dual cache alone, those of all layers and of the head, in each library."""
    _, _, params = network(args, VARIED)
    weights = [layer for name in MATRICES for layer in np.asarray(params["blocks"][name])] + [
        np.asarray(params["head"])
    ]
    inputs = {size: np.ones((rows * args.block, size), np.float32) for size in {len(w) for w in weights}}
    ours = jax.jit(lambda inputs, weights: [inputs[len(w)] @ w for w in weights])
    given = {size: jnp.asarray(x) for size, x in inputs.items()}, [jnp.asarray(w) for w in weights]
    theirs = [torch.from_numpy(w.T.copy()) for w in weights]  # as PyTorch's linear layers hold them
    x = {size: torch.from_numpy(each) for size, each in inputs.items()}
    return Sides(lambda: ours(*given), lambda: [torch.nn.functional.linear(x[w.shape[1]], w) for w in theirs])


def show_products(args: Namespace, rows: int, decoding: float) -> None:
    """Prints what the matrix products of a step beside the dual cache take in each library.

    Args:
        args: the sizes.
        rows: the number of prompts.
        decoding: the seconds in which jaxblock decodes them.
    """
    sides = step_products(args, rows)
    turns = [Sides(*map(seconds, sides)) for _ in range(10 * args.repeat + 1)][1:]  # the first one warms up
    ours, theirs = ([getattr(turn, side) for turn in turns] for side in Sides._fields)
    steps, (_, shown) = args.response // args.block * (args.steps - 1), ratio(theirs, ours)
    print(
        f"batch {rows}: the matrix products of a step with dual take {statistics.median(ours) * 1e3:.1f} ms in jaxblock, "
        f"{statistics.median(theirs) * 1e3:.1f} ms in PyTorch: {shown}; they are {steps * statistics.median(ours) / decoding:.0%} of "
        "jaxblock's time, beside those of the full passes"
    )


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, str]:
    """Returns the median of the rounds' ratios, and shows it with its range."""
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    middle = statistics.median(ratios)
    return middle, f"{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Prints tokens per second of every case, and the ratios; returns PyTorch's time over jaxblock's by case."""
    args = sizes_parser(__doc__).parse_args(argv)
    torch.set_num_threads(args.threads)
    print(
        f"d {args.d}, {args.layers} layers, vocabulary {args.vocab:,}, prompt {args.prompt}, response {args.response}, block "
        f"{args.block}, {args.steps} steps a block; PyTorch {torch.__version__} with {args.threads} threads, logits at: {args.head}"
    )
    decoders = checked_decoders(args)
    times = {case: Sides([], []) for case in decoders}
    for _ in range(args.repeat):
        for case, sides in decoders.items():
            for call, record in zip(sides, times[case], strict=True):
                record.append(seconds(call))
    found = _report(args, times)
    for rows in args.batch:
        show_products(args, rows, statistics.median(times[Case(rows, "dual")].ours))
    return found


def _report(args: Namespace, times: dict[Case, Sides]) -> dict[str, float]:
    found = {}
    for case, (ours, theirs) in times.items():
        speeds = [case.rows * args.response / statistics.median(side) for side in (ours, theirs)]
        found[f"{case.cache}, batch {case.rows}"], shown = ratio(theirs, ours)
        print(
            f"batch {case.rows}, cache {case.cache:6}: jaxblock {speeds[0]:8.1f} tokens/s, PyTorch {speeds[1]:8.1f}; "
            f"PyTorch's time over jaxblock's {shown}"
        )
    most, least = max(args.batch), min(args.batch)
    for case in (Case(rows, cache) for rows in args.batch for cache in CACHES[1:]):
        _, shown = ratio(times[Case(case.rows, "none")].ours, times[case].ours)
        print(f"batch {case.rows}: jaxblock's time without a cache over that with {case.cache}: {shown}")
    for cache in CACHES if most > least else ():
        published = [most / least * time for time in times[Case(least, cache)].torch]
        _, shown = ratio(published, times[Case(most, cache)].ours)
        print(f"cache {cache:6}: jaxblock's tokens/s at batch {most} over PyTorch's at batch {least}: {shown}")
    return found


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()

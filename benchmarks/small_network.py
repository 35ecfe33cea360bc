"""Defines what benchmarks of the train step and of decoding share: a network with random weights, sizes, prompts, a clock."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np

from jaxblock import build
from jaxblock.diffusion.decoding.config import CacheName
from jaxblock.models.architecture import Architecture
from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.spec import init_params
from jaxblock.models.transformer import Transformer
from jaxblock.types import Params

CACHES: tuple[CacheName, ...] = get_args(CacheName)

VARIED = 0.2
"""A standard deviation of weights with which a decoder commits many different tokens; with smaller ones it repeats a few."""

SIZES = {
    "d": 256,
    "layers": 6,
    "vocab": 8_000,
    "prompt": 64,
    "response": 128,
    "block": 32,
    "steps": 16,
    "repeat": 5,
}


def sizes_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser of the sizes: ``--steps`` are those of a block."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="PyTorch's; JAX always takes all cores")
    parser.add_argument("--head", choices=("block", "all"), default="block", help="where PyTorch computes logits")
    return parser


def network(args: argparse.Namespace, init_std: float | None = None) -> tuple[Architecture, Transformer, Params]:
    """Makes a network of LLaDA's kind with random weights in float32; its last token is the mask.

    Args:
        args: the sizes.
        init_std: the standard deviation of the weights; None for the default of jaxblock's configs.
    """
    mlp_dim = args.d * 8 // 3 // 8 * 8
    settings = ModelConfig(d_model=args.d, n_layers=args.layers, n_heads=8, mlp_dim=mlp_dim, init_std=init_std)
    arch = registry.architecture_from_config(settings, vocab_size=args.vocab, mask_id=args.vocab - 1, eos_id=1)
    net = build.network(arch, settings)
    return arch, net, init_params(net.param_table, 0, "float32")


def random_prompts(args: argparse.Namespace, rows: int) -> np.ndarray:
    """Returns random prompts of one length, int32 [rows, prompt]."""
    return np.random.default_rng(0).integers(2, args.vocab - 1, (rows, args.prompt), dtype=np.int32)


def token_forwards(cache: CacheName, prompt: int, response: int, block: int, steps: int) -> int:
    """Counts the positions that are fed to the network to decode a row, if every block takes ``steps`` forwards."""
    width, starts = prompt + response, range(prompt, prompt + response, block)
    later = {"none": lambda start: width, "prefix": lambda start: width - start, "dual": lambda start: block}[cache]
    return sum(width + (steps - 1) * later(start) for start in starts)


def seconds(call: Callable[[], Any]) -> float:
    """Returns the wall time of a call in seconds, including the wait for its result."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin

"""Counts what one step of the compiled decoder writes to memory, by operation, for every cache and batch size.

A step of few positions multiplies little, so what is copied beside the products counts: the matrices of every layer, if a pass takes
them out of their stacks, or the cached keys and values, if new ones are laid over a copy. The numbers are read off the compiled
program; nothing is decoded, and they do not depend on the load of the machine.

    python -m benchmarks.decode_traffic
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.small_network import CACHES, network, sizes_parser
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import CacheName, DecodeConfig
from jaxblock.fit.hlo import Module, parse_program
from jaxblock.fit.loops import costliest_branch, executed_computations

_WRITES_NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional")
_OPERATION = re.compile(r'op_name="[^"]*?([^/"]+)"')


def compiled_decoder(args: argparse.Namespace, rows: int, cache: CacheName) -> Module:
    """Compiles the decoder for a batch of prompts, and returns its program."""
    arch, net, params = network(args)
    net = dataclasses.replace(
        net, scan_layers=False
    )  # as by default at the default sizes; a scan would be another loop
    layout = Layout(args.response, args.block, "same_position", "aligned", None, arch.need_mask_id(), 1, (1,))
    options = DecodeConfig(steps_per_block=args.steps, early_stop=False, cache=cache).static(args.block)
    given = jnp.zeros((rows, args.prompt), jnp.int32), jnp.full(rows, args.prompt, jnp.int32), jnp.arange(rows)
    compiled = jax.jit(decoder.decode_prompts, static_argnums=(0, 1, 2))
    return parse_program(str(compiled.lower(net, layout, options, params, 0, *given).compile().as_text()))


def written_by_step(module: Module) -> Counter[str]:
    """Returns the bytes that one round of the decoder's loop over steps writes, by the operation that writes them last.

    Where blocks have loops of their own, since their passes are not equally wide, it is the one that writes most; so it is of steps
    that look at more or fewer positions of the block.
    """
    loops = [
        instruction.attribute("body")
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "while"
    ]
    return max((_written(module, body) for body in loops if not _has_loop(module, body)), key=Counter.total)


def _has_loop(module: Module, computation: str) -> bool:
    inside = executed_computations(module._replace(entry=computation))
    return any(step.opcode == "while" for one in inside for step in module.computations.get(one.name, {}).values())


def _written(module: Module, computation: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for instruction in module.computations[computation].values():
        if instruction.opcode == "conditional":
            found += _written(module, costliest_branch(module, instruction))
        elif instruction.opcode not in _WRITES_NOTHING:
            operation = _OPERATION.search(instruction.rest)
            found[operation[1] if operation else instruction.opcode] += int(instruction.bytes)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Prints the bytes that a step writes, and the operations that write most; returns the bytes by case."""
    args = sizes_parser(__doc__).parse_args(argv)
    totals = {}
    for rows in args.batch:
        for cache in CACHES:
            found = written_by_step(compiled_decoder(args, rows, cache))
            totals[f"{cache}, batch {rows}"] = found.total()
            most = ", ".join(f"{operation} {size / 1e6:.1f}" for operation, size in found.most_common(6))
            print(f"batch {rows}, cache {cache:6}: a step writes {found.total() / 1e6:7.1f} MB ({most})")
    return totals


if __name__ == "__main__":
    main()

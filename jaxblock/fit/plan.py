"""A plan: compiles, compares with the chip, and where it does not fit looks for the smallest change that does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxblock.config.config import Config
from jaxblock.fit import compile as ahead
from jaxblock.fit import layout, programs, sizes
from jaxblock.fit.advice import Found, advise
from jaxblock.fit.estimate import estimate_step
from jaxblock.fit.programs import Program
from jaxblock.fit.topology import Topology
from jaxblock.fit.transfers import KINDS, Collective
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.spec import count_params

Say = Callable[[str], None]


def make(
    config: Config,
    topology: Topology,
    *,
    model_config: str | None = None,
    decoder: bool = True,
    tries: int = 6,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Plans a run.

    Args:
        config: resolved and valid.
        topology: where it would run; its devices must be there (``topology.compile_environment``).
        model_config: a config.json with the network's sizes; None for those of what the config starts from.
        decoder: plan the decoder too.
        tries: how many changes may be compiled where it does not fit.
        say: told what is being compiled.

    Returns:
        Plain values, ready for JSON: see docs/plan.md.

    Raises:
        UserError: the sizes are not known, or the mesh is not the topology's.
    """
    arch, source = sizes.architecture(config, model_config)
    settled, notes = layout.settle(config, topology)
    mesh = layout.mesh(settled, topology)
    say(f"compiling the train step for {topology.name}")
    step = programs.train_step(settled, arch, mesh)
    limit = step.memory.limit or topology.chip.memory
    fits = step.memory.total <= limit and step.costs is not None
    result = {
        "topology": topology.name,
        "devices": topology.devices,
        "estimate_from_host": topology.is_estimate,
        "chip": topology.chip._asdict(),
        "model": {"source": source, "family": arch.family, "parameters": _count(arch)},
        "mesh": {name: getattr(settled.train, name) for name in ("slices", "data_parallel", "fsdp", "tensor")},
        "rows": settled.train.batch_size,
        "rows_per_device": settled.train.batch_size / layout.ways(settled),
        "notes": notes,
        "limit": limit,
        "train": _described(step, topology, _tokens(settled)),
        "fits": fits,
    }
    if decoder:
        say("compiling the decoder")
        block = programs.decode_block(settled, arch, mesh)
        fits_too = block.memory.total <= limit and block.costs is not None
        result["decode"] = {**_described(block, topology, None), "fits": fits_too}
    if not fits:
        tried, found = advise(
            settled, layout.ways(settled), topology.chips, ahead.trier(arch, list(mesh.devices.flat), limit, say), tries
        )
        result["tried"] = [_advice(one) for one in tried]
        result["advice"] = None if found is None else _advice(found)
    return result


def _count(arch: Architecture) -> int:
    return count_params(registry.param_table(arch))


def _tokens(config: Config) -> int:
    canvas = config.canvas
    width = canvas.total_len or canvas.prompt_len + canvas.response_len
    return config.train.batch_size * config.method.draws * width


def _described(program: Program, topology: Topology, tokens: int | None) -> dict[str, Any]:
    """A program's needs as plain values."""
    described: dict[str, Any] = {
        "memory": program.memory._asdict(),
        "parts": program.parts,
        "compile_seconds": round(program.seconds, 1),
    }
    found = program.costs
    if found is None:
        return described
    described["flops"] = found.flops
    described["traffic"] = found.traffic
    described["sent"] = {kind: found.sent(kind) for kind in (*KINDS, "across slices") if found.sent(kind)}
    described["collectives"] = [
        {
            "kind": one.kind,
            "bytes": one.sent,
            "times": one.times,
            "devices": one.group,
            "shapes": _shapes(one),
            "from": one.name,
        }
        for one in found.collectives[:12]
    ]
    guess = estimate_step(found, topology.chip)
    if guess is not None and tokens is not None:
        seconds = guess.step
        described["estimate"] = {
            **guess._asdict(), "step": seconds, "bound": guess.bound, "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_chip": tokens / seconds / topology.devices,
        }  # fmt: skip
    return described


def _shapes(one: Collective) -> list[str]:
    return [f"{shape.kind}[{','.join(map(str, shape.dims))}]" for shape in one.shapes[:3]]


def _advice(found: Found) -> dict[str, Any]:
    return {"flags": found.flags, "cost": found.cost, **found.trial._asdict()}

"""Plans a run: compiles it, compares its needs with the chip, and searches for the cheapest change if it does not fit."""

from __future__ import annotations

from typing import Any

from jaxblock.config.config import Config
from jaxblock.fit.advice import Found, advise
from jaxblock.fit.compile import Say, try_by_compiling
from jaxblock.fit.costs import estimate_step
from jaxblock.fit.placement import place_run, planned_mesh, row_shards
from jaxblock.fit.programs import Program, decoder_program, train_program
from jaxblock.fit.sizes import planned_architecture
from jaxblock.fit.topology import Topology
from jaxblock.fit.transfers import COLLECTIVE_KINDS, Collective
from jaxblock.models.families import registry
from jaxblock.models.spec import count_params


def plan_run(
    config: Config,
    topology: Topology,
    *,
    model_config: str | None = None,
    decoder: bool = True,
    tries: int = 6,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Plans a run in this process, whose JAX must have the topology's devices (``topology.compile_environment``).

    Args:
        config: the run's settings, checked.
        topology: the devices that the run is planned for.
        model_config: a config.json with the network's sizes; None for those of the checkpoint that the config starts from.
        decoder: whether to plan the decoder too.
        tries: the number of changes that may be compiled if the run does not fit.
        say: prints what is being compiled.

    Returns:
        The plan as plain values, ready for JSON (docs/plan.md).

    Raises:
        UserError: the network's sizes are not known, or the config's mesh does not fit the topology.
    """
    arch, source = planned_architecture(config, model_config)
    placed, notes = place_run(config, topology)
    mesh = planned_mesh(placed, topology)
    say(f"compiling the train step for {topology.name}")
    step = train_program(placed, arch, mesh)
    limit = step.memory.limit or topology.chip.memory
    fits = step.memory.total <= limit and step.costs is not None
    result = {
        **_place(placed, topology),
        "model": {"source": source, "family": arch.family, "parameters": count_params(registry.param_table(arch))},
        "notes": [*notes, *registry.unused_sizes(config.model, arch)],
        "limit": limit,
        "train": _described(step, topology, _tokens(placed)),
        "fits": fits,
    }
    if decoder:
        say("compiling the decoder")
        block = decoder_program(placed, arch, mesh)
        fits_too = block.memory.total <= limit and block.costs is not None
        result["decode"] = {**_described(block, topology, None), "fits": fits_too}
    if not fits:
        tried, found = advise(
            placed,
            row_shards(placed),
            topology.chips,
            try_by_compiling(arch, list(mesh.devices.flat), limit, say),
            tries,
        )
        result["tried"] = [_advice(one) for one in tried]
        result["advice"] = None if found is None else _advice(found)
    return result


def _place(config: Config, topology: Topology) -> dict[str, Any]:
    """Returns the devices, and how rows and weights are split over them, as plain values."""
    return {
        "topology": topology.name,
        "devices": topology.devices,
        "estimate_from_host": topology.is_estimate,
        "chip": topology.chip._asdict(),
        "mesh": {name: getattr(config.train, name) for name in ("slices", "data_parallel", "fsdp", "tensor")},
        "rows": config.train.batch_size,
        "rows_per_device": config.train.batch_size / row_shards(config),
    }


def _tokens(config: Config) -> int:
    """Counts the canvas positions that one update processes, over all rows and draws."""
    canvas = config.canvas
    width = canvas.total_len or canvas.prompt_len + canvas.response_len
    return config.train.batch_size * config.method.draws * width


def _described(program: Program, topology: Topology, tokens: int | None) -> dict[str, Any]:
    """Returns a program's memory and costs as plain values, with an estimate of its time unless ``tokens`` is None.

    Args:
        program: the compiled program.
        topology: the devices that the program was compiled for.
        tokens: the number of canvas positions that the program processes, for the estimated tokens per second.
    """
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
    described["sent"] = {kind: found.sent(kind) for kind in (*COLLECTIVE_KINDS, "across slices") if found.sent(kind)}
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
    """Returns the first three shapes of a collective, as the compiler writes them."""
    return [f"{shape.kind}[{','.join(map(str, shape.dims))}]" for shape in one.shapes[:3]]


def _advice(found: Found) -> dict[str, Any]:
    """Returns a change and the result of trying it as plain values."""
    return {"flags": found.flags, "cost": found.cost, **found.trial._asdict()}

"""Prints a plan as tables."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxblock.training.observe.device_memory import gib

_OF_TEMPORARIES = ("gradients", "activations", "logits")


def print_plan(console: Console, plan: dict[str, Any]) -> None:
    """Prints a plan: the devices, memory and costs of its programs, and whether it fits.

    Args:
        console: the console to print on.
        plan: the dict that ``plan.plan_run`` returns.
    """
    chip, mesh = plan["chip"], plan["mesh"]
    write_line = partial(console.print, highlight=False)
    write_line(
        f"[bold]{plan['topology']}[/]: {plan['devices']} x {chip['name']}, mesh "
        + " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1 or name == "fsdp")
        + f"; {plan['rows']} rows per update, {plan['rows_per_device']:g} per device",
    )
    model = plan["model"]
    write_line(f"{model['family']}, {model['parameters']:,} parameters, from {model['source']}")
    for note in plan["notes"]:
        write_line(f"note: {note}")
    if plan["estimate_from_host"]:
        write_line(
            "ESTIMATE: there is no compiler for this platform here; compiled for the host's CPU instead, whose temporaries and "
            "collectives differ",
        )
    programs = [plan[name] for name in ("train", "decode") if name in plan]
    console.print(_memory_table(plan, programs))
    console.print(_costs_table(programs))
    _print_verdict(console, plan)


def _memory_table(plan: dict[str, Any], programs: list[dict[str, Any]]) -> Table:
    table = Table(title="memory of one device", title_justify="left")
    for name in ("", "train step", "decode block"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, value: Any, style: str | None = None) -> None:
        cells = [value(program) for program in programs]
        if any(cell is not None for cell in cells):
            table.add_row(name, *("" if cell is None else gib(cell) for cell in cells), style=style)

    for kind in ("parameters", "frozen base", "optimizer state", "moving average", "batch"):
        row(kind, lambda program, kind=kind: program["parts"].get(kind))
    row("temporaries", lambda program: program["memory"]["temporaries"])
    for kind in _OF_TEMPORARIES:
        row(f"  {kind} (by shape)", lambda program, kind=kind: program["parts"].get(kind), "dim")
    row("outputs not in place", lambda program: program["memory"]["outputs"] or None)
    row("program", lambda program: program["memory"]["code"] or None)
    row("total", lambda program: program["memory"]["total"], "bold")
    table.add_row(f"{plan['chip']['name']} can use", *(gib(plan["limit"]) for _ in programs))
    return table


def _costs_table(programs: list[dict[str, Any]]) -> Table:
    table = Table(title="costs of one device", title_justify="left")
    for name in ("", "train step", "decode block, all steps"):
        table.add_column(name, justify="left" if not name else "right")
    programs = [program for program in programs if "flops" in program]
    if not programs:
        return table
    table.add_row("matrix products", *(_flop(program["flops"]) for program in programs))
    table.add_row("memory traffic", *(gib(program["traffic"]) for program in programs))
    kinds = dict.fromkeys(kind for program in programs for kind in program["sent"])
    for kind in kinds:
        table.add_row(f"sent, {kind}", *(gib(program["sent"].get(kind, 0.0)) for program in programs))
    return table


def _print_verdict(console: Console, plan: dict[str, Any]) -> None:
    write_line = partial(console.print, highlight=False)
    guess = plan["train"].get("estimate")
    if guess:
        write_line(
            f"step time, ESTIMATE (roofline, nothing ever waits): {_milliseconds(guess['step'])} by {guess['bound']} (compute "
            f"{_milliseconds(guess['compute'])}, memory {_milliseconds(guess['memory'])}, links "
            f"{_milliseconds(guess['links'])}"
            + (f", across slices {_milliseconds(guess['across'])}" if guess["across"] else "")
            + f"); at most {guess['tokens_per_second']:,.0f} tokens/s, {guess['tokens_per_second_per_chip']:,.0f} per chip",
        )
    if plan["fits"]:
        console.print(f"[bold green]it fits[/]: {plan['train']['memory']['total'] / plan['limit']:.0%} of the memory")
    else:
        console.print("[bold red]it does not fit[/]")
        for one in plan.get("tried", []):
            how = f"{gib(one['needed'])}" + ("" if one["compiled"] else " of arguments alone")
            word = "[green]fits[/]" if one["fits"] else "does not fit"
            write_line(f"  {one['flags']}: {word}, {how}  ({one['cost']})")
        if plan.get("advice"):
            write_line(f"[bold]smallest change that fits, compiled:[/] {plan['advice']['flags']}")
        else:
            write_line("nothing that was tried fits: plan for more chips, or raise --tries")
    if "decode" in plan and not plan["decode"]["fits"]:
        write_line("[red]the decoder does not fit[/]: set decode.batch_size lower")


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def _flop(count: float) -> str:
    for unit, name in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count:,.0f} FLOP"

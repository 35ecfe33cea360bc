"""``jaxblock study``: runs and reports a study, a grid of training runs and their evaluations."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jaxblock.commands import say
from jaxblock.config.config import Config
from jaxblock.errors import UserError

if TYPE_CHECKING:
    from jaxblock.study.cells import Plan
    from jaxblock.study.spec import Study
    from jaxblock.study.work import Verbs


@dataclass(frozen=True)
class Options:
    """Runs a study, a grid of training runs and evaluations: `run FILE --out DIR`, `status DIR`, `report DIR`."""

    action: Annotated[Literal["run", "status", "report", "cell"], tyro.conf.Positional]
    """`run` computes what is missing, `status` says what is done and left, `report` writes report.md (with its pictures) and
    report.html; `cell` computes the one cell that `cells` names, as `run` does in processes of its own."""
    target: Annotated[str, tyro.conf.Positional]
    """`run`: the study's file (configs/study/NAME.yaml); else its folder."""
    out: str | None = None
    """`run`: the study's folder, made where it is absent; `report`: the folder of the report, the study's own without one."""
    jobs: int = 1
    """`run`: the number of cells that are computed at a time, each with its share of the cores; 1 on an accelerator."""
    cells: tuple[str, ...] = ()
    """`run`: computes only these cells, with those that they start from; all without any. `cell`: the cell."""
    seeds: tuple[int, ...] = ()
    """`run`: computes only cells of these seeds (with `cells`, only those of them that have these seeds), with those that they start
    from; all without any."""
    identity: str | None = None
    """`cell`: what `run` knows of the cell, a hash; the folder must hold a plan with the same cell."""


_USED = {"run": ("out", "jobs", "cells", "seeds"), "status": (), "report": ("out",), "cell": ("cells", "identity")}
"""The options that each action reads."""


def run(options: Options, config: Config) -> int:
    """Does what the action says."""
    for option in fields(options)[2:]:
        if option.name not in _USED[options.action] and getattr(options, option.name) != option.default:
            used = ", ".join(f"--{name}" for name in _USED[options.action]) or "none"
            raise UserError(
                f"study {options.action} does not use --{option.name}: leave it out (its options are: {used})"
            )
    return {"run": _run, "status": _status, "report": _report, "cell": _cell}[options.action](options)


def _run(options: Options) -> int:
    """Computes the cells that are missing; the exit code is 1 where some could not be."""
    from jaxblock.study import results, runner

    if options.out is None:
        raise UserError("study run needs the study's folder: give --out DIR")
    if options.jobs < 1:
        raise UserError(f"jobs is {options.jobs}: it must be at least 1")
    study, plan = runner.prepare_study(options.target, options.out, _verbs(), say)
    not_done = runner.run_cells(study, plan, options.out, options.jobs, _wanted(options, study, plan), say)
    if not_done:
        say(f"{len(not_done)} cells are not done: {', '.join(not_done)}")
        return 1
    # A process that runs another file in this folder may have computed some of them in another way.
    results.check_results(study, plan, results.read_results(options.out), options.out, options.target)
    say(f"done: see `jaxblock study report {options.out}`")
    return 0


def _wanted(options: Options, study: Study, plan: Plan) -> list[str]:
    """Returns the names of the cells that the options ask for.

    Raises:
        UserError: the study has no such cell or seed, or no cell has both.
    """
    cells = [plan.cell(name) for name in dict.fromkeys(options.cells)] or plan.cells
    unknown = set(options.seeds) - set(study.seeds)
    if unknown:
        raise UserError(f"the study has no seed {min(unknown)}; its seeds are {', '.join(map(str, study.seeds))}")
    found = [cell.name for cell in cells if not options.seeds or cell.seed in options.seeds]
    if not found:
        raise UserError(
            f"none of {', '.join(options.cells)} has a seed of {', '.join(map(str, options.seeds))}: leave out --seeds or --cells"
        )
    return found


def _cell(options: Options) -> int:
    """Computes one cell in this process, unless another one does."""
    from jaxblock.io.leases import Refused
    from jaxblock.io.locks import only_writer
    from jaxblock.study import results, runner, work

    study, plan = results.read_plan(options.target)
    if len(options.cells) != 1:
        raise UserError("study cell computes one cell: name it by --cells")
    cell = runner.planned_cell(study, plan, options.cells[0], options.identity, options.target)
    found = results.read_results(options.target)
    mine = {name: one for name, one in found.items() if name in (cell.name, cell.start)}
    results.check_results(study, plan, mine, options.target)
    try:
        with only_writer(f"{options.target}/claims/{cell.name}", say) as lock:
            runner.check_start(study, cell, options.target)
            return work.run_cell(study, cell, options.target, _verbs(), say, lock.check)
    except Refused:
        return runner.BUSY


def _status(options: Options) -> int:
    """Prints how many cells of each arm are done, running and left, and about how long the rest takes."""
    from jaxblock.study import report, results

    _, plan = results.read_plan(options.target)
    print(report.status(plan, results.read_results(options.target), options.target))
    return 0


def _report(options: Options) -> int:
    """Writes the report of a study's results so far."""
    from jaxblock.study import report, results

    study, plan = results.read_plan(options.target)
    out, found = options.out or options.target, results.read_results(options.target)
    results.check_results(study, plan, found, options.target)
    report.write_report(study, plan, found, out)
    say(f"wrote {os.path.join(out, 'report.md')} and {os.path.join(out, 'report.html')}")
    return 0


def _verbs() -> Verbs:
    """Returns the verbs that a study calls."""
    from rich.console import Console

    from jaxblock.commands import evaluate, prepare, train
    from jaxblock.study.work import Verbs

    def trained(config: Config) -> int:
        return train.train(config, Console(file=sys.stderr)).code

    def evaluated(config: Config, run_folder: str, step: int, out: str) -> int:
        options = evaluate.Options(checkpoint=run_folder, out=out, step=step)
        return evaluate.run(options, config)

    return Verbs(lambda config: prepare.run(prepare.Options(), config), trained, evaluated)

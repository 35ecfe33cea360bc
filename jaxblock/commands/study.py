"""``jaxblock study``: runs and reports a study, a grid of training runs and their evaluations."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jaxblock.commands import say
from jaxblock.config.config import Config
from jaxblock.errors import UserError

if TYPE_CHECKING:
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
    """The cells to compute, with those that they start from; all without any."""
    seeds: tuple[int, ...] = ()
    """`run`: computes only cells of these seeds; all without any."""


def run(options: Options, config: Config) -> int:
    """Does what the action says."""
    return {"run": _run, "status": _status, "report": _report, "cell": _cell}[options.action](options)


def _run(options: Options) -> int:
    """Computes the cells that are missing; the exit code is 1 where some could not be."""
    from jaxblock.study import runner

    if options.out is None:
        raise UserError("study run needs the study's folder: give --out DIR")
    if options.jobs < 1:
        raise UserError(f"jobs is {options.jobs}: it must be at least 1")
    study, plan = runner.prepare_study(options.target, options.out, _verbs(), say)
    wanted = list(options.cells)
    if options.seeds:
        unknown = set(options.seeds) - set(study.seeds)
        if unknown:
            raise UserError(f"the study has no seed {min(unknown)}; its seeds are {', '.join(map(str, study.seeds))}")
        wanted += [cell.name for cell in plan.cells if cell.seed in options.seeds]
    not_done = runner.run_cells(plan, options.out, options.jobs, wanted, say)
    say(
        f"{len(not_done)} cells are not done: {', '.join(not_done)}"
        if not_done
        else f"done: see `jaxblock study report {options.out}`"
    )
    return 1 if not_done else 0


def _cell(options: Options) -> int:
    """Computes one cell in this process, unless another one does."""
    from jaxblock.io.leases import Refused
    from jaxblock.io.locks import only_writer
    from jaxblock.study import results, runner, work

    study, plan = results.read_plan(options.target)
    if len(options.cells) != 1:
        raise UserError("study cell computes one cell: name it by --cells")
    cell = plan.cell(options.cells[0])
    found = results.read_results(options.target)
    mine = {name: one for name, one in found.items() if name in (cell.name, cell.start)}
    results.check_results(study, plan, mine, options.target)
    try:
        with only_writer(f"{options.target}/claims/{cell.name}", say):
            return work.run_cell(study, cell, options.target, _verbs(), say)
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

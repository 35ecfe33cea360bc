"""Runs the cells of a study in processes of their own, several at a time, and spread over machines by a shared folder."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxblock.config.checks import check_config
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.diffusion import layouts
from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes
from jaxblock.io.locks import only_writer
from jaxblock.io.paths import as_path, is_remote
from jaxblock.io.signals import sigterm_raises
from jaxblock.models.architecture import Architecture
from jaxblock.study.cells import (
    Cell,
    Plan,
    check_budgets,
    data_config,
    fingerprint,
    identity,
    lay_out,
    run_config,
    scored_config,
)
from jaxblock.study.results import Result, check_results, is_done, read_results, write_plan
from jaxblock.study.spec import Study
from jaxblock.study.study_file import read_study
from jaxblock.study.work import Verbs
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.checkpoints.run_folder import is_run
from jaxblock.training.weights import architecture

BUSY = 75
"""The exit code of a process whose cell another process is computing (EX_TEMPFAIL)."""

AGAIN = 60.0
"""Seconds after which a cell that another process computes is tried again, since that process may have ended before it was done."""

Say = Callable[[str], object]


def prepare_study(spec: str, folder: str, verbs: Verbs, say: Say) -> tuple[Study, Plan]:
    """Reads a study's file, prepares its data, lays out its cells, and checks them against what the folder holds.

    Args:
        spec: the study's file.
        folder: the study's folder, which may be absent.
        verbs: the verbs.
        say: prints a line.

    Returns:
        (the study, what it computes).

    Raises:
        UserError: the file is wrong, data cannot be prepared, a budget does not fit an arm, or the folder holds the result of a cell
            that had other settings.
    """
    if is_remote(folder):
        raise UserError(
            f"{folder}: a study's folder is local, or on a disk that its machines share: give another --out"
        )
    study = read_study(spec)
    for arm in study.arms:
        study.config(arm)
        for decoding in study.decodings:
            study.config(arm, decoding)
    try:
        check_budgets(study)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    with only_writer(f"{folder}/prepared", say, wait=True):  # another process of the study prepares the same data
        configs = [data_config(study, task, folder) for task in study.tasks]
        # Tasks that train a tokenizer come before those that use it.
        for config in sorted(configs, key=lambda one: one.data.tokenizer != "train"):
            if not (as_path(config.data.prepared) / "manifest.json").exists():
                say(f"preparing {config.data.prepared}")
                verbs.prepare(check_config(config, ("data", "canvas")))
    architecture_of = functools.cache(lambda arm: _architecture(study, arm, folder))
    try:
        plan = lay_out(study, architecture_of)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    fingerprints = {cell.name: fingerprint(study, cell) for cell in plan.cells}
    for cell in plan.cells:
        check_cell(study, cell, folder, architecture_of(cell.arm))
    check_results(study, plan, read_results(folder), folder, spec)
    write_plan(folder, read_bytes(spec).decode(), plan, fingerprints)
    return study, plan


def check_cell(study: Study, cell: Cell, folder: str, arch: Architecture) -> None:
    """Checks the settings by which a cell is trained and scored.

    Args:
        study: the study.
        cell: the cell.
        folder: the study's folder.
        arch: the architecture of the cell's network.

    Raises:
        UserError: a setting is wrong, or a network cannot be decoded with it.
    """
    try:
        decodings = {point.decoding for point in cell.points} & study.decodings.keys()
        configs = [run_config(study, cell, folder)]
        configs += [scored_config(study, cell.arm, decoding, folder) for decoding in sorted(decodings)]
        for config in configs:
            layouts.check_decoding(config.canvas, config.decode, arch)
    except UserError as error:
        raise UserError(f"{cell.name}: {error}") from error


def planned_cell(study: Study, plan: Plan, name: str, wanted: str | None, folder: str) -> Cell:
    """Returns the cell of a name, as the process that wants it computed knows it.

    Args:
        study: the study, as its folder describes it.
        plan: what the study computes, as its folder says.
        name: the cell's name.
        wanted: the cell's ``identity`` in that process; None for the cell as it is in the folder.
        folder: the study's folder, for messages.

    Raises:
        UserError: there is no such cell, or the folder holds the plan of another file by now.
    """
    if wanted is not None and [identity(study, cell) for cell in plan.cells if cell.name == name] != [wanted]:
        raise UserError(
            f"{folder} holds the plan of another file, or of another version of it, than the one whose {name} is to be computed: run "
            "one file at a time in a folder, and then give `jaxblock study run` this one again"
        )
    return plan.cell(name)


def check_start(study: Study, cell: Cell, folder: str) -> None:
    """Checks that a cell without a checkpoint finds the run from which it starts at the step at which it is to start.

    Args:
        study: the study.
        cell: the cell.
        folder: the study's folder.

    Raises:
        UserError: that run is at another step, as where another study went on with it.
    """
    first = study.arms[cell.arm].start
    begun = is_run(f"{folder}/runs/{cell.name}") and _steps_of(f"{folder}/runs/{cell.name}")
    if first is None or begun or study.config(cell.arm).model.init_step != "latest":
        return
    run, wanted = f"{folder}/runs/{cell.start}", study.arms[first].steps
    there = _steps_of(run) if is_run(run) else []
    if there[-1:] != [wanted]:
        found = f"is at step {there[-1]:,}" if there else "has no checkpoint"
        raise UserError(
            f"{cell.name} starts from step {wanted:,} of {run} (arms.{first}.steps), which {found}: use another --out, or move it and "
            f"{folder}/results/{cell.start}.json away, so that it is trained again"
        )


def _steps_of(run: str) -> list[int]:
    with contextlib.closing(CheckpointReader(run)) as checkpoints:
        return checkpoints.steps()


def _architecture(study: Study, arm: str, folder: str) -> Architecture:
    """Returns the architecture of an arm's network, which is that of the arm with which its chain of starts begins."""
    first = arm
    while (start := study.arms[first].start) is not None:
        first = start
    config = replace(study.config(first), data=data_config(study, study.arms[first].task, folder).data)
    return architecture(config, open_prepared(config.data.prepared), None)


@dataclass
class _Jobs:
    """Holds the processes that compute cells, by the cell's name."""

    study: Study
    folder: str
    most: int
    say: Say
    running: dict[str, tuple[subprocess.Popen[bytes], int]] = field(default_factory=dict)

    def start(self, cell: Cell) -> None:
        """Starts the process of a cell; on CPUs every process has its own share of the cores."""
        logs = Path(self.folder) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        place = next(at for at in range(self.most) if at not in {at for _, at in self.running.values()})
        command = [sys.executable, "-m", "jaxblock", "study", "cell", self.folder, "--cells", cell.name]
        command += ["--identity", str(identity(self.study, cell))]
        environment = {"JAX_COMPILATION_CACHE_DIR": str(Path(self.folder).resolve() / "cache"), **os.environ}
        with open(logs / f"{cell.name}.log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, stdin=subprocess.DEVNULL)
        _pin(process.pid, place, self.most)
        self.running[cell.name] = (process, place)
        self.say(f"{cell.name}: started")

    def ended(self) -> Iterator[tuple[str, int]]:
        """Yields the cells whose processes have ended, with their exit codes."""
        for name, (process, _) in list(self.running.items()):
            code = process.poll()
            if code is not None:
                del self.running[name]
                yield name, code

    def close(self) -> None:
        """Tells all processes to save and stop, and waits for them."""
        for process, _ in self.running.values():
            process.terminate()
        for process, _ in self.running.values():
            process.wait()


def _pin(pid: int, place: int, most: int) -> None:
    """Gives a process the cores that belong to its place, where there are enough of them for all places."""
    if most < 2 or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= most:
        os.sched_setaffinity(pid, cores[place::most])


def run_cells(
    study: Study, plan: Plan, folder: str, jobs: int, wanted: Collection[str], say: Say, poll: float = 1.0
) -> list[str]:
    """Computes cells, each in a process of its own, until all are done or have failed.

    Args:
        study: the study.
        plan: what the study computes.
        folder: the study's folder.
        jobs: the number of processes at a time.
        wanted: the names of the cells to compute (with what they start from); empty for all.
        say: prints a line.
        poll: seconds between two looks at the processes.

    Returns:
        The names of the cells that are not done: they failed, or what they start from did.
    """
    by_name = {cell.name: cell for cell in plan.cells}
    left = _with_starts(plan, wanted or by_name)
    failed: set[str] = set()
    elsewhere: dict[str, float] = {}  # cells of other processes, and when to look at them again
    pool = _Jobs(study, folder, jobs, say)
    with sigterm_raises(), contextlib.closing(pool):
        while True:
            results = read_results(folder)
            left = [name for name in left if not _complete(by_name[name], results, folder, left, by_name)]
            open_ = [name for name in left if name not in failed and name not in pool.running]
            ready = [name for name in open_ if by_name[name].start not in left]
            free = [name for name in ready if elsewhere.get(name, 0.0) <= time.monotonic()]
            for name in free[: jobs - len(pool.running)]:
                pool.start(by_name[name])
            if not pool.running and not ready:
                return left
            time.sleep(poll)
            for name, code in pool.ended():
                if code == BUSY:
                    say(f"{name}: another process computes it")
                    elsewhere[name] = time.monotonic() + AGAIN
                elif code:
                    failed.add(name)
                    say(f"{name}: failed with code {code}; see {folder}/logs/{name}.log: {_last_line(folder, name)}")
                elif not _complete(by_name[name], read_results(folder), folder, left, by_name):
                    failed.add(name)
                    say(f"{name}: ended without an error, but is not done; see {folder}/logs/{name}.log")
                else:
                    say(f"{name}: done")


def _with_starts(plan: Plan, wanted: Collection[str]) -> list[str]:
    """Returns the wanted cells and those that they start from, in the order of the study."""
    needed = set()
    for name in wanted:
        at: str | None = name
        while at is not None:
            needed.add(at)
            at = plan.cell(at).start
    return [cell.name for cell in plan.cells if cell.name in needed]


def _complete(cell: Cell, results: dict[str, Result], folder: str, left: list[str], by_name: dict[str, Cell]) -> bool:
    """Tells whether nothing is left to do for a cell: it is scored, and its weights are there if an unfinished cell starts from them."""
    if not is_done(cell, results.get(cell.name)):
        return False
    followers = [
        name for name in left if by_name[name].start == cell.name and not is_done(by_name[name], results.get(name))
    ]
    return not followers or (as_path(folder) / "runs" / cell.name / "metrics.jsonl").exists()


def _last_line(folder: str, name: str) -> str:
    lines = (Path(folder) / "logs" / f"{name}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it is empty"

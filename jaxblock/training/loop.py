"""Runs the training loop on the host: steps, evaluations, metrics, checkpoints and interruptions.

Between evaluations and saves the device is kept busy: when a line of metrics is due, the next step is dispatched before the
metrics of the steps so far are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, cast

import jax
from etils import epath
from rich.console import Console

from jaxblock.config.yaml import to_tree
from jaxblock.data.loader import Batch, BatchAt, batches
from jaxblock.data.mixture import describe_files, mixture_of
from jaxblock.errors import UserError, printable
from jaxblock.evaluation.graders import find_grader
from jaxblock.evaluation.results import Solved
from jaxblock.evaluation.runner import Evaluator
from jaxblock.io.locks import FolderLock
from jaxblock.io.paths import as_path
from jaxblock.parallel import processes
from jaxblock.training import resume
from jaxblock.training.checkpoints import retention
from jaxblock.training.guard.interrupt import Interrupt, shielded
from jaxblock.training.guard.steps import SkippedSteps
from jaxblock.training.guard.watchdog import Watchdog
from jaxblock.training.observe import goodput, throughput
from jaxblock.training.observe.device_memory import MemoryPlan
from jaxblock.training.observe.goodput import Goodput
from jaxblock.training.observe.metrics import METRICS_FILE, UNWRITTEN_ROWS, restore_rows
from jaxblock.training.observe.profiler import Profiler
from jaxblock.training.observe.progress import TrainProgress
from jaxblock.training.observe.samples import in_one_line
from jaxblock.training.observe.throughput import Work
from jaxblock.training.observe.trackers import Trackers
from jaxblock.training.observe.window import StepWindow, summarise
from jaxblock.training.optim import gating, schedules
from jaxblock.training.session import OpenedSession, Session
from jaxblock.training.state import TrainState
from jaxblock.training.step import Step, StepMetrics

INTERRUPTED, PREEMPTED = 130, 143
"""The exit codes of a run that saved and stopped because of SIGINT (the user), or of SIGTERM (the machine is taken away)."""


@dataclass
class Outcome:
    """Says how a run ended.

    Attributes:
        step: the number of updates done.
        interrupted: whether the run was told to stop before its last step; it has saved, and can be resumed.
        finished_before: whether the run was complete before it was started, so that nothing was done.
        last: the last evaluation's row of metrics; {} without an evaluation.
        metrics_file: the metrics file that this process wrote; None where another process writes them, or nothing was done.
        code: the exit code of the process.
    """

    step: int
    interrupted: bool = False
    finished_before: bool = False
    last: dict[str, Any] = field(default_factory=dict)
    metrics_file: epath.Path | None = None
    code: int = 0


def end_finished(opened: OpenedSession, console: Console) -> Outcome:
    """Ends a run whose last step is already done: prints that, without reading weights.

    Args:
        opened: what ``open_session`` returned for a run whose newest checkpoint is of its last step.
        console: prints that there is nothing to do.

    Raises:
        UserError: rows of metrics that could not be written earlier still cannot be written.
    """
    assert opened.step is not None and opened.checkpoints is not None
    opened.checkpoints.close()
    out = opened.config.train.out
    if opened.process_index == 0:
        restore_rows(out, opened.saved.get(UNWRITTEN_ROWS, []))
    console.out(f"{out} is finished ({opened.step:,} steps); nothing to do", highlight=False)
    return Outcome(opened.step, finished_before=True)


def run(
    session: Session,
    step: Step,
    plan: MemoryPlan | None,
    console: Console,
    clock: Goodput,
    watchdog: Watchdog,
    lock: FolderLock | None,
) -> Outcome:
    """Trains from the session's step to the last one, or until the run is told to stop.

    Args:
        session: the run, with its state on the devices.
        step: the update, compiled; in debug mode not compiled.
        plan: the memory that the step was planned to take; None where it was not compiled.
        console: prints what happens.
        clock: measures where the time goes.
        watchdog: reports a stage that takes too long.
        lock: the lock of the run folder; None in all processes of a group but the first.

    Raises:
        UserError: too many steps in a row were not finite, the last state could not be saved, or another process has taken
            the run folder over.
    """
    with jax.set_mesh(session.mesh), contextlib.closing(session.checkpoints):
        loop = _Loop(session, step, plan, console, clock, watchdog, lock)
        with contextlib.closing(loop):
            return loop.run()


class _Loop:
    """Trains one process's part of a run, from ``session.step`` to the last step."""

    def __init__(
        self,
        session: Session,
        step: Step,
        plan: MemoryPlan | None,
        console: Console,
        clock: Goodput,
        watchdog: Watchdog,
        lock: FolderLock | None,
    ) -> None:
        train = session.config.train
        self.session, self.config, self.console = session, session.config, console
        self.step_fn, self.plan, self.clock, self.watchdog, self.lock = step, plan, clock, watchdog, lock
        skipped_before = session.step - gating.count_updates(
            session.state.opt_state
        )  # in earlier processes of this run
        self.skipped = SkippedSteps(train.max_skipped, skipped_before)
        self.lr = schedules.learning_rates(self.config.optimizer, train.steps)
        run_folder = as_path(train.out)
        self.trackers: Trackers | None = None
        if session.process_index == 0:
            begin = session.step if session.resumed else -1
            clock.add_earlier(goodput.read_earlier_time(run_folder / METRICS_FILE, begin))
            self.trackers = Trackers(train, to_tree(self.config), begin, self._say)
        self.profiler = Profiler(train.profile, run_folder, session.process_index, session.process_count, self._say)
        self.profiler.skip_to(session.step)
        self.peak = throughput.peak_flops(session.mesh)
        self.window = StepWindow()
        self.progress = TrainProgress(train.steps, start=session.step, every=train.log_every, console=console)
        self.evaluated: dict[str, Any] = {}
        self.saved = session.step if session.resumed else -1
        self.evaluator = Evaluator(
            net=session.learner.net,
            canvas=self.config.canvas,
            encoder=session.prepared.encoder,
            decode=self.config.decode,
            grader=find_grader(self.config.evaluate.grader),
            nelbo_samples=self.config.evaluate.nelbo_samples,
        )

    def run(self) -> Outcome:
        """Trains to the last step, or to an interruption; evaluates, logs and saves on the way."""
        train, session = self.config.train, self.session
        state, step = session.state, session.step
        data = self._data()
        if self.plan is not None:
            self._say(self.plan.describe())
        self.clock.started()
        with Interrupt() as stop, self.progress, contextlib.closing(self.profiler), contextlib.closing(data):
            self._before_first_step(state)
            stopping = processes.any_of(stop.asked)
            while step < train.steps and not stopping:
                state, metrics, batch = self._step(state, step, data)
                step += 1
                self.profiler.after(step, metrics)
                self.window.add(step, metrics, batch)
                if session.nans is not None:
                    session.nans.check(step, metrics, batch.index)
                self._after_step(state, step, metrics)
                if session.process_count == 1 or step % train.log_every == 0:
                    stopping = processes.any_of(
                        stop.asked
                    )  # all processes must stop at one step; asking them waits for the device
            if stopping:
                if self.window.metrics:
                    self._report()
                self._save(state, step)
            code = 0 if not stopping else PREEMPTED if processes.any_of(stop.terminated) else INTERRUPTED
        self.watchdog.at("end", step)
        with self.clock.during("save"):
            session.checkpoints.close()
        return self._end(step, code)

    def close(self) -> None:
        """Closes the trackers, also of a run that failed, unless another process has taken the run folder over."""
        if self.trackers is not None and (self.lock is None or self.lock.held()):
            self.trackers.close()

    def _data(self) -> Generator[Batch]:
        """Yields batches from the run's step on. Closing the generator ends the loader and waits for its workers."""
        train, method, prepared = self.config.train, self.config.method, self.session.prepared
        mixture = mixture_of(prepared.manifest.splits["train"], prepared.folder, self.config.data)
        at = BatchAt(
            prepared.records("train"),
            canvas=self.config.canvas,
            seed=train.seed,
            batch_size=train.batch_size,
            kind="pairs" if method.pairs else "per_sequence",
            mixture=mixture,
            process_index=self.session.process_index,
            process_count=self.session.process_count,
        )
        if at.epoch < train.batch_size and self.session.process_index == 0:
            what = "(record, block) pairs" if method.pairs else "training records"
            self._say(
                f"train.batch_size {train.batch_size:,} is more than the {at.epoch:,} {what}: every batch repeats some"
            )
        if self.session.process_index == 0 and (said := describe_files(prepared.manifest.splits["train"], mixture)):
            self._say(said)
        start_step = 0 if train.overfit_one_batch else self.session.step
        stream = batches(at, start_step=start_step, workers=train.loader_workers)
        # Worker processes are started when the first batch is read.
        with contextlib.closing(cast(Generator[Batch], stream)):  # Grain's iterator has close()
            with shielded() if train.loader_workers else contextlib.nullcontext():
                first = next(stream)
            yield first
            while train.overfit_one_batch:
                yield first
            yield from stream

    def _before_first_step(self, state: TrainState) -> None:
        """Evaluates a new run before its first step; for a resumed run, writes a row that says where it goes on."""
        step = self.session.step
        if self.session.resumed:
            self._write({"step": step, "kind": "resume"})
        else:
            self._evaluate(state, step)
            self._write(self.clock.row(step))

    def _step(self, state: TrainState, step: int, data: Generator[Batch]) -> tuple[TrainState, StepMetrics, Batch]:
        """Dispatches the step after ``step`` updates, and writes the metrics of earlier steps if they are due."""
        self.watchdog.at("step", step)
        self.clock.charge("step")
        batch = next(data)
        self.clock.charge("data" if self.window.idle() else "step")
        self.profiler.before(step + 1)
        placed = batch if self.config.train.debug else self.session.on_mesh(batch)
        state, metrics = self.step_fn(state, placed, self.session.frozen)
        if self.window.due:
            # The step just dispatched keeps the device busy while the host reads the metrics of the steps before it.
            self._report()
        return state, metrics, batch

    def _after_step(self, state: TrainState, step: int, metrics: StepMetrics) -> None:
        """Writes metrics, evaluates and saves, where that is due after ``step`` updates."""
        train = self.config.train
        last = step == train.steps
        evaluate = last or bool(train.eval_every and step % train.eval_every == 0)
        save = last or step % train.save_every == 0 or step in train.keep_steps
        # A line ends at every checkpoint, so that a run that goes on from it has lost none of the metrics before it.
        self.window.due = evaluate or save or step % train.log_every == 0
        if evaluate or save or (self.window.due and train.debug):
            self._report()
        if evaluate:
            jax.block_until_ready(metrics)  # charges this wait to training, not to the evaluation
            self._evaluate(state, step)
            save = processes.any_of(save or self.session.checkpoints.improves(self._score(step)))
        if evaluate or save:
            self._write(
                self.clock.row(step)
            )  # before the save, so that a resumed run finds the time up to its checkpoint
        if save:
            self._save(state, step)

    def _say(self, text: str | None) -> None:
        if text is not None:
            self.console.out(text, highlight=False)

    def _report(self) -> None:
        """Reads the window's metrics off the device and writes a line of them."""
        window, step, count = self.window, self.window.step, len(self.window.metrics)
        found = jax.device_get(window.metrics)
        if self.plan is not None and step - count == self.session.step:
            self._say(self.plan.compare(jax.local_devices()[0]))  # only after the first steps of this process
        self._say(self.skipped.check(found, step - count, window.records))
        row = summarise(found)
        now = self.clock.training()
        seconds = max(now - window.since, 1e-9)
        self.clock.note_step(seconds / count)
        work, needed = self._work(found)
        speed = needed / seconds
        # This is the learning rate of the window's last step. The schedule counts updates, so earlier skipped steps are
        # subtracted.
        lr = float(self.lr[step - 1 - (self.skipped.total - bool(found[-1].skipped))])
        rates = {"lr": lr, "tokens_per_second": speed, **self._utilisation(work, seconds)}
        self._write({"step": step, "kind": "train", **row, **rates})
        self.progress.train(step, row["loss"], speed)
        window.clear(now)

    def _work(self, steps: list[StepMetrics]) -> tuple[Work, int]:
        """Counts what the window's steps computed, and the positions that were needed, over all processes and draws."""
        rows = self.window.rows * self.session.process_count * self.config.method.draws
        computed, needed = (sum(int(step.losses.positions[i]) for step in steps) for i in (0, 1))
        return Work(rows, computed, rows * self.session.learner.objective.layout.block), needed

    def _utilisation(self, work: Work, seconds: float) -> dict[str, float]:
        """Returns the entries of a metrics row that compare the work with the devices' peak."""
        net = self.session.learner.net
        adapters = None if net.lora is None else net.trainable
        flops = throughput.model_flops(net.param_table, net.arch, work, adapters)
        return throughput.utilisation(flops, seconds, self.peak)

    def _evaluate(self, state: TrainState, step: int) -> None:
        """Scores and decodes validation records, as far as the config asks for it, and writes the result."""
        self.watchdog.at("evaluation", step)
        train, records = self.config.train, self.session.validation
        params = self.session.params_to_score(state)
        row: dict[str, Any] = {"step": step, "kind": "eval"}
        bound = solved = None
        # Evaluations are compiled in debug mode too, since decoding without jit would take minutes.
        with self.clock.during("evaluation"), jax.disable_jit(False):
            if train.eval_nelbo_rows and records:
                bound = self.evaluator.estimate_nelbo(params, records[: train.eval_nelbo_rows])
                row["nelbo_per_token"] = bound.per_text_token._asdict()
                row["nelbo_per_sequence"] = bound.per_sequence._asdict()
            if train.eval_problems and records:
                solved = self.evaluator.solve(params, records[: train.eval_problems])
                row["pass_at_1"] = solved.pass_at_1._asdict()
                row["grader"] = self.config.evaluate.grader
                if self.evaluator.grader.version is not None:
                    row[retention.GRADER_VERSION] = self.evaluator.grader.version
        if bound is None and solved is None:
            return
        self._write(row)
        self.evaluated = row
        self.progress.evaluation(
            step,
            nelbo=None if bound is None else float(bound.per_text_token.mean),
            pass_at_1=None if solved is None else (solved.pass_at_1.correct, solved.pass_at_1.n),
        )
        if solved is not None:
            self._show_samples(solved, step)

    def _show_samples(self, solved: Solved, step: int) -> None:
        """Prints and keeps the answers to the first problems, which are the same at every evaluation."""
        samples = [{"step": step, **row} for row in solved.rows[: self.config.train.sample_count]]
        for sample in samples:
            self.progress.say(printable(in_one_line(sample)))
        if self.trackers is not None:
            self.trackers.write_samples(samples)

    def _write(self, row: dict[str, Any]) -> None:
        """Writes a row of metrics, unless another process has taken the run folder over; precedes every periodic save."""
        if self.lock is not None:
            self.lock.check()
        if self.trackers is not None:
            self.trackers.write(row)

    def _score(self, step: int) -> float | None:
        """Returns the last evaluation's score by ``train.keep_best``; None where it was not of this step."""
        return retention.comparable_score(
            self.config.train.keep_best, self.evaluated if self.evaluated.get("step") == step else {}
        )

    def _save(self, state: TrainState, step: int) -> None:
        """Begins to save the state, unless this step is saved already."""
        if step <= self.saved:
            return
        session = self.session
        self.watchdog.at("save", step)
        kept = resume.saved_values(self.config, session.prepared, session.learner.net.arch, session.base)
        kept[retention.GRADER_VERSION] = self.evaluator.grader.version
        if self.trackers is not None:
            kept[UNWRITTEN_ROWS] = self.trackers.flush()
        jax.block_until_ready(state.step)  # charges this wait to training, not to saving
        with self.clock.during("save"):
            session.checkpoints.save(state, step, kept, self._score(step))
        self.saved = step

    def _end(self, step: int, code: int) -> Outcome:
        """Writes the last line and says how the run ended; raises UserError where the last state was not saved."""
        if processes.any_of(self.session.checkpoints.failed == step):
            raise UserError(
                f"the state after step {step:,}, the last one, could not be saved in {self.session.checkpoints.folder} (see "
                "above). Correct that, and run the same command again: it goes on from the last whole checkpoint"
            )
        metrics_file = None
        if self.trackers is not None:
            row = self.clock.row(step)
            self.trackers.write(row)
            self._say(goodput.describe(row))
            metrics_file = self.trackers.path
        interrupted = step < self.config.train.steps
        return Outcome(
            step, interrupted, last=self.evaluated, metrics_file=metrics_file, code=code if interrupted else 0
        )

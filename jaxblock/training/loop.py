"""The host side of a run: set-up, the loop, evaluation, checkpoints, and what happens when it is interrupted.

The loop never waits for the device: metrics of a step are read after later steps have been dispatched, when a line is
logged.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

from jaxblock.config.config import Config
from jaxblock.config.yaml import to_tree
from jaxblock.data.loader import Batch, BatchAt, batches
from jaxblock.errors import UserError
from jaxblock.evaluation.results import NelboBound, Solved
from jaxblock.evaluation.runner import Evaluator
from jaxblock.fit import compile as ahead
from jaxblock.fit import shapes as abstract
from jaxblock.fit.compile import Ahead
from jaxblock.io.paths import as_path
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import processes
from jaxblock.training.checkpoints import retention
from jaxblock.training.guard.interrupt import Interrupt, shielded
from jaxblock.training.guard.steps import SkippedSteps
from jaxblock.training.guard.watchdog import Watchdog
from jaxblock.training.observe import goodput, throughput
from jaxblock.training.observe.goodput import Goodput
from jaxblock.training.observe.metrics import METRICS_FILE, UNWRITTEN_ROWS
from jaxblock.training.observe.profiler import Profiler
from jaxblock.training.observe.progress import TrainProgress
from jaxblock.training.observe.summary import summarise
from jaxblock.training.observe.throughput import Work
from jaxblock.training.observe.trackers import Trackers
from jaxblock.training.optim import gating, schedules
from jaxblock.training.start import Session, meta, set_up
from jaxblock.training.step import Objective, StepMetrics, compile_step, train_step

INTERRUPTED, PREEMPTED = 130, 143
"""Exit codes of a run that was told to stop and has saved: by its user (SIGINT), by a machine that goes away (SIGTERM)."""


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        step: updates done.
        interrupted: it was told to stop, has saved, and can go on.
        finished_before: there was nothing to do.
        last: the last evaluation's row of metrics.
        code: exit code of the process.
    """

    step: int
    interrupted: bool = False
    finished_before: bool = False
    last: dict[str, Any] = field(default_factory=dict)
    code: int = 0


def train(config: Config, console: Console) -> Outcome:
    """Trains, or goes on training, as the config says.

    Args:
        config: resolved and valid.
        console: where people are told things.

    Returns:
        How it ended.

    Raises:
        UserError: bad settings or data, an existing run that this config does not continue, too many steps in a row
            that are not finite, or a last state that could not be saved.
    """
    with Goodput() as clock, Watchdog(config.train.watchdog_seconds, config.train.on_hang) as watchdog:
        return _train(set_up(config, console, functools.partial(_compile, console)), console, clock, watchdog)


def _compile(
    console: Console,
    config: Config,
    net: Transformer,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Ahead:
    """The step, from shapes alone."""

    def say(text: str) -> None:
        console.out(text, highlight=False)

    state, frozen = abstract.shapes(config, net, optimizer, mesh)
    frozen_table = None if net.lora is None else net.param_table
    how: Any = {"accumulate": config.train.accumulate, "ema": config.optimizer.ema}
    compiled = compile_step(objective, optimizer, state, mesh, net.trainable, frozen_table, **how)
    return ahead.prepare(compiled, config, net.arch, mesh, state, frozen, say)


def _train(session: Session, console: Console, clock: Goodput, watchdog: Watchdog) -> Outcome:
    config = session.config
    with jax.set_mesh(session.mesh):
        if session.step >= config.train.steps:
            console.out(f"{config.train.out} is finished ({session.step:,} steps); nothing to do", highlight=False)
            session.checkpoints.close()
            return Outcome(session.step, finished_before=True)
        try:
            return _Loop(session, console, clock, watchdog).run()
        finally:
            session.checkpoints.close()


@dataclass
class _Window:
    """The steps since the last line of metrics; nothing of theirs has been read off the device.

    ``since`` is the clock's time of training (evaluations, saves and compiling are not in it) when those before were read.
    """

    since: float = 0.0
    metrics: list[StepMetrics] = field(default_factory=list)
    indices: list[np.ndarray] = field(default_factory=list)
    step: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    due: bool = False

    def add(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
        self.step = step
        self.metrics.append(metrics)
        self.indices.append(batch.index)
        self.rows += len(batch.index)
        self.prompt_tokens += int(batch.prompt_len.sum())

    def empty(self, now: float) -> None:
        self.since, self.metrics, self.indices = now, [], []
        self.rows, self.prompt_tokens, self.due = 0, 0, False

    def idle(self) -> bool:
        """Whether the device has done all that it was given. Asks, and does not wait."""
        return not self.metrics or bool(self.metrics[-1].grad_norm.is_ready())  # type: ignore[attr-defined]


class _Loop:
    """One process's run, from ``session.step`` to the last step."""

    def __init__(self, session: Session, console: Console, clock: Goodput, watchdog: Watchdog) -> None:
        self.session, self.config, self.console, self.clock = session, session.config, console, clock
        before = session.step - gating.count_updates(session.state.opt_state)  # skipped by earlier processes
        self.watchdog, self.skips = watchdog, SkippedSteps(session.config.train.max_skipped, before)
        self.run_folder = as_path(self.config.train.out)
        self.lr = schedules.learning_rates(self.config.optimizer, self.config.train.steps)
        self.log: Trackers | None = None
        if session.process_index == 0:
            begin = session.step if session.resumed else -1
            clock.add_earlier(goodput.read_earlier_time(self.run_folder / METRICS_FILE, begin))
            self.log = Trackers(self.config.train, to_tree(self.config), begin, self._say)
        who = (session.process_index, session.process_count)
        self.profiler = Profiler(self.config.train.profile, self.run_folder, *who, self._say)
        self.profiler.skip_to(session.step)
        self.peak = throughput.peak_flops(session.mesh)
        self.nans = session.nans
        self.ahead: Ahead | None = None
        self.evaluated: dict[str, Any] = {}
        self.saved = session.step if session.resumed else -1
        self.evaluator = Evaluator(
            net=session.net,
            canvas=self.config.canvas,
            encoder=session.prepared.encoder,
            decode=self.config.decode,
            grader=self.config.evaluate.grader,
            nelbo_samples=self.config.evaluate.nelbo_samples,
        )

    def run(self) -> Outcome:
        """Trains to the last step, or to an interruption; evaluates, logs and saves on the way."""
        train, session = self.config.train, self.session
        data = self._data()
        step_fn = self._step()
        state, step = session.state, session.step
        window = _Window()
        bar = TrainProgress(train.steps, start=step, every=train.log_every, console=self.console)
        self.clock.started()
        with Interrupt() as stop, bar as progress, contextlib.closing(self.profiler), contextlib.closing(data):
            if not session.resumed:
                self._evaluate(session.scored(state), step, progress)
                self._write(self.clock.row(step))
            else:
                self._write({"step": step, "kind": "resume"})
            stopping = processes.any_of(stop.asked)
            while step < train.steps and not stopping:
                self.watchdog.at("step", step)
                self.clock.charge("step")
                batch = next(data)
                self.clock.charge("data" if window.idle() else "step")
                self.profiler.before(step + 1)
                state, metrics = step_fn(state, batch)
                if window.due:
                    # The step just dispatched keeps the device busy while the host reads those before it.
                    self._report(window, progress)
                step += 1
                self.profiler.after(step, metrics)
                window.add(step, metrics, batch)
                if self.nans is not None:
                    self.nans.check(step, metrics, batch.index)
                last = step == train.steps
                window.due = last or step % train.log_every == 0
                evaluate = last or bool(train.eval_every and step % train.eval_every == 0)
                save = last or step % train.save_every == 0
                if window.due and (evaluate or save or train.debug):
                    self._report(window, progress)
                if evaluate:
                    jax.block_until_ready(metrics)  # evaluating waits for it too: it is training's time
                    self._evaluate(session.scored(state), step, progress)
                    save = processes.any_of(save or session.checkpoints.improves(self._score(step)))
                if evaluate or save:
                    self._write(self.clock.row(step))  # before the save: a checkpoint's time is told up to it
                if save:
                    self._save(state, step)
                if session.process_count == 1 or step % train.log_every == 0:
                    stopping = processes.any_of(stop.asked)  # a group stops together; asking waits for the device
            if stopping:
                if window.metrics:
                    self._report(window, progress)
                self._save(state, step)
            code = 0 if not stopping else PREEMPTED if processes.any_of(stop.terminated) else INTERRUPTED
        self.watchdog.at("end", step)
        with self.clock.during("save"):
            session.checkpoints.close()
        return self._end(step, code)

    def _data(self) -> Generator[Batch]:
        """Batches from the run's step on; closed, it ends the loader and waits for its workers."""
        train, method = self.config.train, self.config.method
        at = BatchAt(
            self.session.prepared.records("train"),
            canvas=self.config.canvas,
            seed=train.seed,
            batch_size=train.batch_size,
            kind="pairs" if method.pairs else "per_sequence",
            process_index=self.session.process_index,
            process_count=self.session.process_count,
        )
        start_step = 0 if train.overfit_one_batch else self.session.step
        stream = batches(at, start_step=start_step, workers=train.loader_workers)
        # Worker processes start with the first batch.
        with contextlib.closing(cast(Generator[Batch], stream)):  # Grain's iterator
            with shielded() if train.loader_workers else contextlib.nullcontext():
                first = next(stream)
            yield first
            while train.overfit_one_batch:
                yield first
            yield from stream

    def _step(self) -> Any:
        session = self.session
        how: Any = {"accumulate": self.config.train.accumulate, "ema": self.config.optimizer.ema}
        if self.config.train.debug:
            return lambda state, batch: train_step(
                session.objective, session.optimizer, state, batch, session.frozen, **how
            )
        ready: Ahead = session.ready
        self.ahead = ready
        self._say(ready.said())
        step = ready.step
        return lambda state, batch: step(state, session.on_mesh(batch), session.frozen)

    def _say(self, text: str | None) -> None:
        if text is not None:
            self.console.out(text, highlight=False)

    def _report(self, window: _Window, progress: TrainProgress) -> None:
        step, count = window.step, len(window.metrics)
        found = jax.device_get(window.metrics)
        if self.ahead is not None and step - count == self.session.step:
            self._say(self.ahead.compared(jax.local_devices()[0]))  # once: what the plan was worth
        self._say(self.skips.check(found, step - count, window.indices))
        row = summarise(found)
        positions = window.prompt_tokens + window.rows * self.config.canvas.response_len
        everywhere = self.session.process_count * self.config.method.draws
        now = self.clock.training()
        seconds = max(now - window.since, 1e-9)
        self.clock.note_step(seconds / count)
        speed = positions * everywhere / seconds
        # Of the last step, whether skipped or not: the optimizer counts updates, so earlier skipped steps are not among them.
        lr = float(self.lr[step - 1 - (self.skips.total - bool(found[-1].skipped))])
        predicted = window.rows * self.session.objective.layout.block
        done = self._arithmetic(Work(*(n * everywhere for n in (window.rows, positions, predicted))), seconds)
        self._write({"step": step, "kind": "train", **row, "lr": lr, "tokens_per_second": speed, **done})
        progress.train(step, row["loss"], speed)
        window.empty(now)

    def _arithmetic(self, work: Work, seconds: float) -> dict[str, float]:
        net = self.session.net
        adapters = None if net.lora is None else net.trainable
        flops = throughput.model_flops(net.param_table, net.arch, work, adapters)
        return throughput.utilisation(flops, seconds, self.peak)

    def _evaluate(self, params: Any, step: int, progress: TrainProgress) -> None:
        self.watchdog.at("evaluation", step)
        train = self.config.train
        held_out = self.session.validation
        row: dict[str, Any] = {"step": step, "kind": "eval"}
        bound: NelboBound | None = None
        solved: Solved | None = None
        # Debug mode is for training steps: decoding without jit would take minutes.
        with self.clock.during("evaluation"), jax.disable_jit(False):
            if train.eval_nelbo_rows and held_out:
                bound = self.evaluator.estimate_nelbo(params, held_out[: train.eval_nelbo_rows])
                row["nelbo_per_token"] = bound.per_text_token._asdict()
                row["nelbo_per_sequence"] = bound.per_sequence._asdict()
            if train.eval_problems and held_out:
                solved = self.evaluator.solve(params, held_out[: train.eval_problems])
                row["pass_at_1"] = solved.pass_at_1._asdict()
                row["grader"] = self.config.evaluate.grader
        if bound is None and solved is None:
            return
        self._write(row)
        self.evaluated = row
        progress.evaluation(
            step,
            nelbo=None if bound is None else float(bound.per_text_token.mean),
            pass_at_1=None if solved is None else (solved.pass_at_1.correct, solved.pass_at_1.n),
        )

    def _write(self, row: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(row)

    def _score(self, step: int) -> float | None:
        """What the last evaluation was worth by ``train.keep_best``, if it was of this step."""
        return retention.score(
            self.config.train.keep_best, self.evaluated if self.evaluated.get("step") == step else {}
        )

    def _save(self, state: Any, step: int) -> None:
        if step > self.saved:
            self.watchdog.at("save", step)
            told = {} if self.log is None else {UNWRITTEN_ROWS: self.log.flush()}
            jax.block_until_ready(state.step)  # saving waits for it too: it is training's time
            with self.clock.during("save"):
                self.session.checkpoints.save(state, step, {**meta(self.session), **told}, self._score(step))
            self.saved = step

    def _end(self, step: int, code: int) -> Outcome:
        if processes.any_of(self.session.checkpoints.failed == step):
            raise UserError(
                f"the state after step {step:,}, the last one, could not be saved in {self.session.checkpoints.folder} (see "
                "above). Mend that, and run the same command again: it goes on from the last whole checkpoint"
            )
        interrupted = step < self.config.train.steps
        if self.log is not None:
            told = self.clock.row(step)
            self.log.write(told)
            self.log.close()
            self._say(goodput.describe(told))
            from jaxblock.reporting import plots  # the better part of a second, which a start need not wait for

            plots.plot_run(self.log.path, self.run_folder / "plots")
        return Outcome(step, interrupted, last=self.evaluated, code=code if interrupted else 0)

"""``jaxblock train``: trains a network, or continues an earlier training run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from jaxblock.commands import say
from jaxblock.commands.unused import unused_flags
from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.evaluation.config import EvaluateConfig
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.training.config import TrainConfig
from jaxblock.training.optim.config import OptimizerConfig

if TYPE_CHECKING:
    from etils import epath
    from rich.console import Console

    from jaxblock.models.architecture import Architecture
    from jaxblock.training.loop import Outcome
    from jaxblock.training.observe.device_memory import MemoryPlan
    from jaxblock.training.step import Step


@dataclass(frozen=True)
class Options:
    """Trains: Blockwise SFT or classical SFT, from random weights, a run or a Hugging Face folder; resumes exactly."""

    config: str | None = None
    """YAML file of sections, or the name of a preset; flags override it."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def run(options: Options, config: Config) -> int:
    """Trains, and prints where the results are or how to continue an interrupted run."""
    import jax
    from rich.console import Console

    console = Console(stderr=True)
    if config.train.debug:
        config = _for_debugging(config)
        _show_first_batch(config, console)
        with jax.disable_jit():
            outcome = train(config, console, options)
    else:
        outcome = train(config, console, options)
    if jax.process_index() > 0:  # only process 0 prints
        return outcome.code
    if outcome.interrupted:
        say(
            f"stopped after step {outcome.step:,} of {config.train.steps:,} and saved. To go on, run the same command "
            f"again (train.resume auto finds {config.train.out})"
        )
        return outcome.code
    if not outcome.finished_before:
        say(f"done: {outcome.step:,} steps; checkpoints, metrics.jsonl and plots are in {config.train.out}")
    return 0


def train(config: Config, console: Console, options: Options | None = None) -> Outcome:
    """Opens the run, builds and compiles its step, loads its weights, trains, and draws its plots.

    Args:
        config: the run's settings, checked.
        console: prints what happens.
        options: the command line's options, whose flags without effect are named; None for none.

    Raises:
        UserError: bad settings or data, a run that does not fit the devices, an existing run that this config does not
            continue or that another process writes, too many steps in a row that are not finite, or a last state that could not be saved.
    """
    from jaxblock import build
    from jaxblock.evaluation.graders import find_grader
    from jaxblock.fit.compile import compile_step
    from jaxblock.training import loop, start
    from jaxblock.training.guard.watchdog import Watchdog
    from jaxblock.training.observe.goodput import Goodput

    find_grader(config.evaluate.grader)  # raises before the work, rather than at the first evaluation
    with (
        Goodput() as clock,
        Watchdog(config.train.watchdog_seconds, config.train.on_hang) as watchdog,
        start.only_writer(config.train.out, console) as lock,
        contextlib.closing(start.open_session(config, console)) as opened,
    ):
        if opened.finished:
            return loop.end_finished(opened, console)
        flags = unused_flags("train", options, config, opened.prepared.manifest) if options else []
        for note in [*flags, *_unused_sizes(config, opened.arch)]:
            _print(console, note)
        config = opened.config
        check_layer = None if opened.nans is None else opened.nans.layer
        stop_ids = opened.prepared.special.stop_ids
        lines = None if config.train.debug else opened.lines
        learner = build.learner(config, opened.arch, stop_ids, check_layer=check_layer, lines=lines)
        step: Step = learner.update
        plan: MemoryPlan | None = None
        if not config.train.debug:
            step, plan = compile_step(config, learner, opened.mesh, lambda text: _print(console, text))
        session = start.load_session(opened, learner, console)
        outcome = loop.run(session, step, plan, console, clock, watchdog, lock)
        if outcome.metrics_file is not None:
            draw_curves(outcome.metrics_file)
    return outcome


def draw_curves(metrics_file: epath.Path) -> None:
    """Draws a run's metrics into its folder ``plots``.

    Args:
        metrics_file: the ``metrics.jsonl`` in the run folder.
    """
    from jaxblock.reporting import plots  # imported here: it takes most of a second

    plots.plot_run(metrics_file, metrics_file.parent / "plots")


def _print(console: Console, text: str) -> None:
    console.out(text, highlight=False)


def _unused_sizes(config: Config, arch: Architecture) -> list[str]:
    """Names the sizes in the config that differ from those of the checkpoint that the run starts from."""
    from jaxblock.models.families import registry

    if config.model.init_from is None:
        return []
    unused = registry.unused_sizes(config.model, arch)
    return [f"{size}: the sizes of a network that model.init_from names are its own" for size in unused]


def _for_debugging(config: Config) -> Config:
    """Returns the same run without remat and without worker processes; its layers are unrolled, since each is checked."""
    model = replace(config.model, remat="none")
    return replace(config, model=model, train=replace(config.train, loader_workers=0))


def _show_first_batch(config: Config, console: Console) -> None:
    """Shows the first two training records as ``jaxblock inspect`` shows them."""
    from jaxblock.commands.inspect import examine_records
    from jaxblock.data.store.prepared_folder import open_prepared
    from jaxblock.reporting import terminal

    prepared = open_prepared(config.data.prepared, verify=config.data.verify)
    count = min(2, len(prepared.records("train")))
    examined, layout = examine_records(config, prepared, "train", tuple(range(count)), 1)
    terminal.print_records(console, layout, examined, prepared.tokenizer.piece)

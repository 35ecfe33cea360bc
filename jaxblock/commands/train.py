"""``jaxblock train``: trains a network, or goes on training it."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxblock.commands import say
from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.evaluation.config import EvaluateConfig
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.training.config import TrainConfig
from jaxblock.training.optim.config import OptimizerConfig


@dataclass(frozen=True)
class Options:
    """Trains: Blockwise SFT or classical SFT, from random weights, a run or a Hugging Face folder; resumes exactly."""

    config: str | None = None
    """YAML file of sections; flags override it."""
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
    """Trains, and says where the results are or how to go on with an interrupted run."""
    import jax
    from rich.console import Console

    from jaxblock import build
    from jaxblock.commands.inspect import examine_records
    from jaxblock.data.store.prepared_folder import open_prepared
    from jaxblock.reporting import terminal
    from jaxblock.training import loop

    console = Console(stderr=True)
    if config.train.debug:
        config = build.debug(config)
        prepared = open_prepared(config.data.prepared)
        count = min(2, len(prepared.records("train")))
        examined, layout = examine_records(config, prepared, "train", tuple(range(count)), 1)
        terminal.print_records(console, layout, examined, prepared.tokenizer.piece)
        with jax.disable_jit():
            outcome = loop.train(config, console)
    else:
        outcome = loop.train(config, console)
    if jax.process_index() > 0:  # one process speaks for all
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

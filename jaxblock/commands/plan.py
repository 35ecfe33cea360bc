"""``jaxblock plan``: says what a run needs on a topology of devices, without those devices."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from jaxblock.commands import say
from jaxblock.commands.unused import unused_flags
from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError
from jaxblock.io.files import check_absent, write_text
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.training.config import TrainConfig
from jaxblock.training.optim.config import OptimizerConfig


@dataclass(frozen=True)
class Options:
    """Says what a run needs on a topology before it is rented: compiles the real step and decoder without the devices."""

    topology: str
    """The devices, such as `v5e-16`, `v6e-8`, `v5p-8` (4 chips), `2xv5e-256` (two slices), `h200-1`, `h100-8` or `cpu-8`."""
    config: str | None = None
    """YAML file of sections, or the name of a preset; flags override it."""
    model_config: str | None = None
    """A config.json, Hugging Face folder or run with the network's sizes; None for those of `model.init_from`."""
    decoder: bool = True
    """Compile the decoder too."""
    tries: int = 6
    """How many changes of the settings may be compiled to find one that fits, where the run itself does not fit."""
    json: str | None = None
    """Also write the plan here, with every large collective; an existing file is refused, unless `overwrite` is set."""
    overwrite: bool = False
    """Whether to replace an existing file of a plan."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)


def run(options: Options, config: Config) -> int:
    """Plans a run; the exit code is 0 whether it fits or not, since the answer is the result."""
    from rich.console import Console

    from jaxblock.fit import report
    from jaxblock.fit.process import plan_in_process

    if options.tries < 0:
        raise UserError(f"tries is {options.tries}: it must be 0 or more")
    for note in unused_flags("plan", options, config):
        say(f"note: {note}")
    if options.json:
        read = (options.config, options.model_config, config.model.init_from)
        check_absent(options.json, overwrite=options.overwrite, inputs=read)
    plan = plan_in_process(
        config,
        options.topology,
        model_config=options.model_config,
        decoder=options.decoder,
        tries=options.tries,
        say=say,
    )
    report.print_plan(Console(), plan)
    if options.json:
        write_text(options.json, json.dumps(plan, indent=1) + "\n", overwrite=options.overwrite)
        say(f"wrote {options.json}")
    return 0

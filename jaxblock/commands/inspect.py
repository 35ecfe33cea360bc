"""``jaxblock inspect``: shows records as training feeds them to the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxblock.commands import say
from jaxblock.commands.unused import unused_flags
from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.errors import UserError
from jaxblock.io.files import check_absent, write_text
from jaxblock.models.config import ModelConfig
from jaxblock.settings import SplitName
from jaxblock.training.config import TrainConfig

if TYPE_CHECKING:
    from jaxblock.data.store.prepared_folder import Prepared
    from jaxblock.diffusion.canvas import Layout
    from jaxblock.models.architecture import Architecture
    from jaxblock.reporting.examine import ExaminedRecord


@dataclass(frozen=True)
class Options:
    """Shows what training feeds the model: token kinds, the block grid, masks, and which tokens carry loss."""

    config: str | None = None
    """YAML file of sections, or the name of a preset; flags override it."""
    split: SplitName = "train"
    """The split of the prepared data to show records of."""
    records: tuple[int, ...] = (0, 1)
    """Indices of the records to show."""
    steps: int = 2
    """The number of training steps whose draws are shown for each record."""
    html: str | None = None
    """Also write one self-contained HTML file here; an existing file is refused, unless `overwrite` is set."""
    overwrite: bool = False
    """Whether to replace an existing HTML file."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def run(options: Options, config: Config) -> int:
    """Shows the records in the terminal and, on request, writes them to an HTML file."""
    from rich.console import Console

    from jaxblock.data.store.prepared_folder import open_prepared
    from jaxblock.data.text.splits import train_paths
    from jaxblock.reporting import html, terminal

    if options.html:
        read = (options.config, config.data.prepared, *train_paths(config.data), config.data.test)
        check_absent(options.html, overwrite=options.overwrite, inputs=read)
    prepared = open_prepared(config.data.prepared, verify=config.data.verify)
    for note in unused_flags("inspect", options, config, prepared.manifest):
        say(f"note: {note}")
    examined, layout = examine_records(config, prepared, options.split, options.records, options.steps)
    about = (
        f"{config.method.objective}, law {config.method.law}, {config.method.weighting} weights, "
        f"normalised by {config.method.normalize}, blocks {config.method.blocks}"
    )
    terminal.print_records(Console(), layout, examined, prepared.tokenizer.piece, about)
    if options.html:
        write_text(
            options.html,
            html.html_page(layout, examined, prepared.tokenizer.piece, about=about),
            overwrite=options.overwrite,
        )
        say(f"wrote {options.html}")
    return 0


def examine_records(
    config: Config, prepared: Prepared, split: str, indices: tuple[int, ...], steps: int
) -> tuple[list[ExaminedRecord], Layout]:
    """Examines records with the draws that the first training steps make for a batch of these records.

    Args:
        config: the run's settings, checked.
        prepared: the prepared data.
        split: the split that the records are of.
        indices: the records' indices in the split.
        steps: the number of training steps whose draws are made.

    Returns:
        (one examined record for each index, the layout of the training canvas).

    Raises:
        UserError: no index or no step was asked for, or an index is outside the split.
    """
    import jax
    import numpy as np

    from jaxblock import build
    from jaxblock.data.loader import pad_records
    from jaxblock.reporting.examine import draws_of_steps, examine

    source = prepared.records(split)
    if not indices or steps < 1:
        raise UserError("inspect needs at least one of `records` and at least 1 of `steps`")
    for index in indices:
        if not 0 <= index < len(source):
            raise UserError(f"records: {split} has records 0 to {len(source) - 1}, not {index}")
    records = [source[index] for index in indices]
    block = None
    if config.method.pairs:
        block = np.zeros(len(records), np.int32)
    batch = pad_records(records, config.canvas, block=block)
    sized = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=len(records)))
    net = build.network(_architecture(config, prepared), config.model)
    objective = build.objective(sized, net, prepared.special.stop_ids)
    canvas = jax.jit(objective.canvas)(batch)
    draws, noise = draws_of_steps(lambda step: objective.draw(batch, canvas, step), range(steps))
    examined = examine(
        objective.layout,
        canvas,
        draws,
        method=objective.method,
        noise=noise,
        drawn_blocks=objective.drawn_blocks(batch),
        labels=[f"{split} {record.index} ({record.source})" for record in records],
    )
    return examined, objective.layout


def _architecture(config: Config, prepared: Prepared) -> Architecture:
    """Returns the architecture of the network that training would use, without reading weights.

    Where ``model.init_from`` is not on this machine, its logit alignment, the only trait that is shown, comes from the
    published checkpoint of this name, from ``model.alignment``, or else from ``model.family``.
    """
    from jaxblock.fit.sizes import PUBLISHED
    from jaxblock.io.hub import is_downloaded
    from jaxblock.models.families import registry
    from jaxblock.training import weights

    source = config.model.init_from
    if source is None or is_downloaded(source):
        arch = weights.architecture(config, prepared, None)
        named = PUBLISHED.get(config.data.tokenizer.split("@")[0])
        if source is None and named is not None:
            theirs = registry.from_hf(named, config.data.tokenizer).alignment
            say(
                f"model.init_from is not set: {arch.alignment} logits of a random {config.model.family} network are shown, as it "
                f"would be trained. {config.data.tokenizer}, whose tokenizer this is, has {theirs} logits: name it there if you mean it"
            )
        return arch
    random = dataclasses.replace(config.model, init_from=None, alignment=None)
    arch = weights.architecture(dataclasses.replace(config, model=random), prepared, None)
    published = PUBLISHED.get(source.split("@")[0])
    if published is not None:
        return dataclasses.replace(arch, alignment=registry.from_hf(published, source).alignment)
    alignment = config.model.alignment or arch.alignment
    say(f"model.init_from {source} is not here, so {alignment} logits (model.alignment, else model.family) are shown")
    return dataclasses.replace(arch, alignment=alignment)

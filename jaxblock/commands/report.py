"""``jaxblock report``: writes one page about a run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxblock.commands import say
from jaxblock.config.config import Config
from jaxblock.errors import UserError
from jaxblock.io.files import check_absent, read_bytes, write_text
from jaxblock.io.paths import as_path

if TYPE_CHECKING:
    from jaxblock.training.checkpoints.run_folder import Run


@dataclass(frozen=True)
class Options:
    """Writes one page about a run: curves with values, where the time went, evaluations, samples, settings."""

    run: Annotated[str, tyro.conf.Positional]
    """The run folder of `jaxblock train`."""
    out: str | None = None
    """The HTML file to write; None for report.html in the run folder. An existing file is refused, unless `overwrite` is set."""
    evaluations: tuple[str, ...] = ()
    """Folders of `jaxblock evaluate --out` to show; those in the run folder and in the folders beside it are found."""
    overwrite: bool = False
    """Whether to replace an existing file."""


def run(options: Options, config: Config) -> int:
    """Reads the run and writes the page; ``config`` is not used, since the run has its own."""
    from jaxblock.reporting.report import About, report_page
    from jaxblock.reporting.run_files import read_run_files
    from jaxblock.training.checkpoints import run_folder

    if not run_folder.is_run(options.run):
        raise UserError(f"{options.run} is not the folder of a training run (no config.yaml and model.json)")
    out = options.out or os.fspath(as_path(options.run) / "report.html")
    check_absent(out, overwrite=options.overwrite, inputs=(options.run, *options.evaluations))
    opened = run_folder.open_run(options.run)
    files = read_run_files(options.run, options.evaluations)
    text = read_bytes(opened.folder / run_folder.CONFIG).decode("utf-8", "replace")
    last = max((row["step"] for row in [*files.metrics.train, *files.metrics.evals]), default=0)
    name = os.path.basename(os.path.abspath(options.run)) if "://" not in options.run else opened.folder.name
    about = About(name, options.run, _facts(opened, last), _changed(opened.config), text)
    write_text(out, report_page(about, files), overwrite=options.overwrite)
    say(f"wrote {out}")
    return 0


def _facts(opened: Run, last: int) -> list[tuple[str, str]]:
    """Says what the run trains, on what and how, as (name, text) pairs."""
    config, arch = opened.config, opened.arch
    kept, adapters = opened.manifest.splits["train"]["kept"], config.lora.rank
    canvas = config.canvas
    return [
        ("network", f"{arch.family}, {arch.n_layers} layers, width {arch.d_model}, vocabulary {arch.vocab_size:,}"),
        ("trains", f"LoRA adapters of rank {adapters}" if adapters else "all weights"),
        ("from", config.model.init_from or "random weights"),
        ("data", f"{kept:,} training records, batches of {config.train.batch_size}"),
        ("objective", f"{config.method.objective}, law {config.method.law}"),
        (
            "canvas",
            f"{canvas.prompt_len} prompt and {canvas.response_len} response positions, blocks of {canvas.block}",
        ),
        ("steps", f"{last:,} of {config.train.steps:,}"),
    ]


def _changed(config: Config) -> list[tuple[str, str]]:
    """Returns the settings that are not the defaults, as (name, value) pairs."""
    from jaxblock.config.yaml import to_tree

    own, plain = to_tree(config), to_tree(Config())
    return [
        (f"{section}.{name}", _shown(value))
        for section, values in own.items()
        for name, value in values.items()
        if value != plain[section][name]
    ]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)

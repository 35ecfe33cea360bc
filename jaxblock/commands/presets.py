"""``jaxblock presets``: lists the presets, or prints the file of one."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Annotated

import tyro

from jaxblock.config.config import Config
from jaxblock.config.presets import describe_preset, nearest_preset, presets
from jaxblock.errors import UserError


@dataclass(frozen=True)
class Options:
    """Lists the presets, files of settings that --config takes by name; given a name, prints that file."""

    preset: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """The preset to print, to be changed: jaxblock presets llada_8b_lora > run.yaml."""


def run(options: Options, config: Config) -> int:
    """Prints each preset's name with a sentence, or the text of the one that is named."""
    if options.preset is not None:
        if options.preset not in presets():
            raise UserError(f"there is no preset {options.preset!r}; {nearest_preset(options.preset)}")
        print(presets()[options.preset].read_text(encoding="utf-8"), end="")
        return 0
    for name in presets():
        print(name)
        print(textwrap.fill(describe_preset(name), 100, initial_indent="    ", subsequent_indent="    "))
    return 0

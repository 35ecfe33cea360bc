"""Finds the presets, the files of settings that come with jaxblock, by name.

In the repository they lie in ``configs/``; an installed package has them in its folder ``presets`` (setup.py).
"""

from __future__ import annotations

import difflib
import functools
import os
import pathlib

from jaxblock.errors import UserError
from jaxblock.io.paths import is_remote

_ENDINGS = (".yaml", ".yml")


@functools.cache
def presets() -> dict[str, pathlib.Path]:
    """Returns the file of every preset by the preset's name, in alphabetical order."""
    package = pathlib.Path(__file__).resolve().parents[1]
    installed = package / "presets"
    folder = installed if installed.is_dir() else package.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def describe_preset(name: str) -> str:
    """Returns the first sentence of the comment at the top of a preset's file."""
    words = []
    for line in presets()[name].read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line == "#":
            break
        words += line[1:].split()
        ends = [at for at, word in enumerate(words) if word.endswith(".")]
        if ends:
            words = words[: ends[0] + 1]
            break
    return " ".join(words)


def nearest_preset(name: str) -> str:
    """Returns the end of the message about an unknown preset: the one that was probably meant, or all of them."""
    close = difflib.get_close_matches(name, presets(), n=1)
    return f"did you mean {close[0]}?" if close else f"presets: {', '.join(presets())}"


def find_settings(given: str) -> str:
    """Returns the path of the file of settings that ``--config`` names by its path or by the name of a preset.

    Args:
        given: a path, or a preset's name, which has no ending and no folder.

    Raises:
        UserError: a preset and a file here have that name, so that either could be meant; or neither has.
    """
    if given in presets():
        return _unless_ambiguous(given)
    if is_remote(given) or os.path.exists(given):
        return given
    name, ending = os.path.splitext(os.path.basename(given))
    if ending in _ENDINGS and name in presets():
        raise UserError(f"cannot read {given}: there is no such file. The preset of that name is --config {name}")
    if ending in _ENDINGS or os.path.dirname(given):
        return given  # the code that reads it says that it is not there
    raise UserError(f"--config {given}: there is no preset and no file of that name; {nearest_preset(given)}")


def _unless_ambiguous(name: str) -> str:
    """Returns the path of a preset; raises UserError where another file here could be meant by its name."""
    preset = presets()[name]
    for file in (name, *(name + ending for ending in _ENDINGS)):
        if os.path.isfile(file) and not os.path.samefile(file, preset):
            raise UserError(
                f"--config {name} can mean the preset and the file {file} here: for the file give --config ./{file}, for "
                f"the preset --config {preset}"
            )
    return str(preset)

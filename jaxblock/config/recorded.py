"""Reads and writes our block in a checkpoint's generation_config.json: the settings that the checkpoint was trained for.

An export has no config.yaml. Other libraries keep keys of generation_config.json that they do not know, so the block stays when
they save the file again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxblock.config.yaml import config_from_tree, to_tree
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError
from jaxblock.io.files import read_json
from jaxblock.io.paths import PathLike, as_path

FILE, KEY = "generation_config.json", "jaxblock"
FORMAT = 1
"""The version of the block."""


class Recorded(NamedTuple):
    """Holds the settings that a checkpoint was trained for.

    Attributes:
        canvas: the ``canvas`` section.
        decode: the ``decode`` section.
        text: how text becomes tokens: {"tokenizer": {"file", "sha256"}, "template": {"name", "source", "tokens"}, "special":
            the ids by name, "prompt_template", "system"}.
    """

    canvas: CanvasConfig
    decode: DecodeConfig
    text: Mapping[str, Any]


def to_block(recorded: Recorded) -> dict[str, Any]:
    """Returns the block as JSON values."""
    return {
        "format": FORMAT,
        "canvas": to_tree(recorded.canvas),
        "decode": to_tree(recorded.decode),
        "text": dict(recorded.text),
    }


def read_block(folder: PathLike) -> Recorded | None:
    """Reads the block of a checkpoint's folder.

    Returns:
        The settings; None where generation_config.json is absent or has no block.

    Raises:
        UserError: the file or the block is damaged, or a later version wrote it; the message names the file.
    """
    path = as_path(folder) / FILE
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: it is not what an export writes")
    block = content.get(KEY)
    if block is None:
        return None
    where = f"{path} ({KEY})"
    if not isinstance(block, dict) or not isinstance(block.get("text"), dict):
        raise UserError(f"{where} is not what an export writes: export the run again")
    if block.get("format") != FORMAT:
        raise UserError(
            f"{where} has the format {block.get('format')!r}, not {FORMAT}: read it with the version that wrote it"
        )
    config = config_from_tree({"canvas": block.get("canvas"), "decode": block.get("decode")}, where)
    try:
        config.canvas.check()
        config.decode.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Recorded(config.canvas, config.decode, block["text"])

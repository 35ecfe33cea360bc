"""What a prepared folder says about itself; written last, so that its presence means the folder is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.data.tokens.special import SpecialIds
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError
from jaxblock.io.files import read_json, write_json
from jaxblock.io.paths import PathLike, as_path

FILE = "manifest.json"
FORMAT = 1
_ELSEWHERE = ("prepared", "overwrite")  # fields that do not change what is prepared
_SEEN_LATER = ("context", "suffix_window", "total_len")  # what training shows of the same records


@dataclass(frozen=True)
class Manifest:
    """A prepared folder's description.

    Attributes:
        format: The layout's version.
        fingerprint: SHA-256 of all that decides the content: settings, inputs, tokenizer, template.
        data: The data settings, those of a recipe among them.
        canvas: The canvas settings.
        inputs: For each split its source: {"path", "sha256", "records", "conversations"}.
        tokenizer: {"kind", "files": name -> sha256}.
        template: {"name", "source", "tokens"}.
        special: The special ids.
        vocab_size: Rows of the embedding that are needed: the largest id + 1.
        splits: For each split {"kept", "dropped" and "cut" by reason, "tokens", "blocks"} (see `statistics.describe`).
        overlaps: Prompts that two splits share, by name ("train and test").
    """

    format: int
    fingerprint: str
    data: dict[str, Any]
    canvas: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    tokenizer: dict[str, Any]
    template: dict[str, Any]
    special: SpecialIds
    vocab_size: int
    splits: dict[str, dict[str, Any]]
    overlaps: dict[str, int]

    @property
    def data_config(self) -> DataConfig:
        """The settings the folder was prepared with."""
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.data.items()}
        return DataConfig(**settings)

    @property
    def canvas_config(self) -> CanvasConfig:
        """The canvas the folder was prepared with."""
        return CanvasConfig(**self.canvas)


def write(folder: PathLike, manifest: Manifest) -> None:
    """Writes the manifest, and so declares the folder whole."""
    write_json(as_path(folder) / FILE, dataclasses.asdict(manifest))


def read(folder: PathLike) -> Manifest:
    """A prepared folder's manifest.

    Raises:
        UserError: If there is none, or it is another version's.
    """
    name = os.fspath(folder)
    path = as_path(folder) / FILE
    if not path.exists():
        raise UserError(f"data.prepared: {name} holds no prepared data (no {FILE}); run `jaxblock prepare` first")
    content = read_json(path)
    try:
        if content["format"] != FORMAT:
            raise UserError(
                f"{path}: format {content['format']} is not this version's, {FORMAT}; prepare the data again"
            )
        return Manifest(**{**content, "special": SpecialIds(**content["special"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a manifest of this version ({error}); prepare the data again") from error


def settings(config: Config) -> dict[str, dict[str, Any]]:
    """The (resolved) settings that decide what is prepared, and which a manifest records."""
    data = {
        key: list(value) if isinstance(value, tuple) else value  # as JSON gives it back
        for key, value in dataclasses.asdict(config.data).items()
        if key not in _ELSEWHERE
    }
    canvas = {key: value for key, value in dataclasses.asdict(config.canvas).items() if key not in _SEEN_LATER}
    return {"data": data, "canvas": canvas}


def fingerprint(
    config: Config, inputs: Mapping[str, Mapping[str, Any]], tokenizer: Mapping[str, Any], template: str
) -> str:
    """SHA-256 of everything that decides a prepared folder's content.

    Args:
        config: Its data and canvas sections count.
        inputs: As in the manifest.
        tokenizer: Name -> sha256 of given tokenizer files; empty for one trained here.
        template: The Jinja source.
    """
    hashes = {split: entry["sha256"] for split, entry in inputs.items()}
    content = [FORMAT, settings(config), hashes, dict(tokenizer), template]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(old: Manifest, config: Config) -> list[str]:
    """Which settings differ from those a folder was prepared with, as "data.level = 'easy' there, 'hard' here"."""
    found = []
    for section, values in settings(config).items():
        before = getattr(old, section)
        for key in sorted(before.keys() | values.keys()):
            if before.get(key) != values.get(key):
                found.append(f"{section}.{key} = {before.get(key)!r} there, {values.get(key)!r} here")
    return found

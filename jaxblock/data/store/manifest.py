"""Reads and writes the manifest of a prepared folder, which is written last: a folder that has one is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxblock.data.config import DataConfig
from jaxblock.data.tokens.special import SpecialIds, special_from_json
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError, first_line, shown, warn_of_earlier_version
from jaxblock.io.files import read_json, write_json
from jaxblock.io.paths import PathLike, as_path

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 3
"""The version of a prepared folder. Version 1 did not record all ids that end a response; versions 1 and 2 kept no other fields
of the records than prompt and response."""

# Settings that do not change the records: they say where the folder is, how it is made, or how often or how much of a record
# training shows the model.
_NOT_RECORDED_DATA = ("prepared", "overwrite", "verify", "allow_other_template", "weights", "prepare_workers")
_NOT_RECORDED_CANVAS = ("context", "suffix_window", "total_len")


@dataclass(frozen=True)
class Manifest:
    """Describes a prepared folder.

    Attributes:
        format: The version of the folder's layout.
        fingerprint: The SHA-256 of everything that decides the content: settings, inputs, tokenizer, template.
        data: The data settings, including the values that a recipe gave.
        canvas: The canvas settings.
        inputs: For each split its source: {"path", "sha256", "records", "conversations"}, and "files", a list of the same, where
            there are several.
        tokenizer: The tokenizer's class and files: {"kind", "files": {name: sha256}}.
        template: The chat template: {"name", "source", "tokens"}.
        special: The ids of the special tokens.
        vocab_size: The number of embedding rows that are needed: the largest id + 1.
        splits: For each split {"kept", "dropped" and "cut" by reason, "tokens", "blocks"} (see
            `statistics.LengthStatistics`), "fields" where records have other fields (see `length_rules.SplitCount`), and "files"
            where several files were given: for each {"path", "kept"}, whose records follow each other in this order.
        overlaps: How many prompts two splits share, by the splits' names ("train and test").
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
        """The data settings that the folder was prepared with."""
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.data.items()}
        return DataConfig(**settings)

    @property
    def canvas_config(self) -> CanvasConfig:
        """The canvas settings that the folder was prepared with."""
        return CanvasConfig(**self.canvas)


def write_manifest(folder: PathLike, manifest: Manifest) -> None:
    """Writes the manifest, which marks the folder as whole."""
    write_json(as_path(folder) / MANIFEST_FILE, dataclasses.asdict(manifest))


def read_manifest(folder: PathLike) -> Manifest:
    """Reads the manifest of a prepared folder.

    Raises:
        UserError: If there is no manifest, it is damaged, or a later version wrote it.
    """
    name = os.fspath(folder)
    path = as_path(folder) / MANIFEST_FILE
    if not path.exists():
        raise UserError(
            f"data.prepared: {name} holds no prepared data (no {MANIFEST_FILE}); run `jaxblock prepare` first"
        )
    content = read_json(path)
    try:
        if content["format"] not in (1, 2, MANIFEST_FORMAT):
            raise UserError(
                f"{path}: format {content['format']} is not this version's, {MANIFEST_FORMAT}; prepare the data again"
            )
        _check_types(content)
        manifest = Manifest(**{**content, "special": special_from_json(content["special"])})
        manifest.data_config.check()
        manifest.canvas_config.check()
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a manifest of this version ({first_line(error)}); prepare the data again"
        ) from error
    if manifest.format == 1:
        warn_of_earlier_version(name, "all ids that end a response")
    return manifest


def _check_types(content: Mapping[str, Any]) -> None:
    """Raises TypeError or KeyError where a manifest's value has another type than `write_manifest` gives it."""
    kinds = {"fingerprint": str, "special": dict, "vocab_size": int}
    for field in dataclasses.fields(Manifest):
        kind = kinds.get(field.name, int if field.name == "format" else dict)
        if not isinstance(content[field.name], kind):
            raise TypeError(f"{field.name} is {shown(content[field.name])}")
    parts = [*content["inputs"].values(), *content["splits"].values(), content["template"]["tokens"]]
    texts = [content["template"]["name"], content["template"]["source"], *content["tokenizer"]["files"].values()]
    if not all(isinstance(part, dict) for part in parts) or not all(isinstance(text, str) for text in texts):
        raise TypeError("an entry of inputs, splits, template or tokenizer has another type")


def recorded_settings(data: DataConfig, canvas: CanvasConfig) -> dict[str, dict[str, Any]]:
    """Returns the (resolved) settings that decide what is prepared, as a manifest records them."""
    return {
        "data": {
            key: list(value) if isinstance(value, tuple) else value  # JSON has no tuples
            for key, value in dataclasses.asdict(data).items()
            if key not in _NOT_RECORDED_DATA
        },
        "canvas": {k: value for k, value in dataclasses.asdict(canvas).items() if k not in _NOT_RECORDED_CANVAS},
    }


def compute_fingerprint(
    settings: Mapping[str, Mapping[str, Any]],
    hashes: Mapping[str, str],
    tokenizer: Mapping[str, Any],
    template: str,
) -> str:
    """Computes the SHA-256 of everything that decides a prepared folder's content.

    Args:
        settings: The settings, as `recorded_settings` returns them.
        hashes: The hash of the inputs of each split, as in the manifest.
        tokenizer: The SHA-256 of each file of a tokenizer that is not trained here, by name, and the special ids of its
            checkpoint (`ends` where there are several); empty for a tokenizer that is trained here.
        template: The chat template's Jinja source.
    """
    # The number is of this content, not of the manifest: runs compare their data by the fingerprint.
    content = [1, settings, dict(hashes), dict(tokenizer), template]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def changed_settings(old: Manifest, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lists the settings that differ from those in a folder's manifest, as "data.level = 'easy' there, 'hard' here"."""
    found = []
    for section, before in (("data", old.data), ("canvas", old.canvas)):
        values = settings[section]
        for key in sorted(before.keys() | values.keys()):
            if before.get(key) != values.get(key):
                found.append(f"{section}.{key} = {before.get(key)!r} there, {values.get(key)!r} here")
    return found

"""Copies the files that accompany weights: tokenizer, chat template, generation config, and model code, which is never run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxblock.errors import UserError
from jaxblock.io.files import read_json
from jaxblock.io.folders import copy_files
from jaxblock.io.paths import PathLike, as_path
from jaxblock.models.architecture import Architecture

CARD = "README.md"
"""The model card."""
GENERATION = "generation_config.json"
TEMPLATE, CHAT_TEMPLATE = "template.jinja", "chat_template.jinja"
"""The chat template as we render it, and the name under which other readers look for it."""


class Trained(NamedTuple):
    """Holds what an export records beside the weights of a network that jaxblock trained.

    Attributes:
        stop_ids: every token that ends a response.
        chat_template: the Jinja text of the chat template, for other readers.
        settings: further keys of generation_config.json.
    """

    stop_ids: Sequence[int]
    chat_template: str
    settings: Mapping[str, Any]


_TOKENIZER = (
    "tokenizer.json",
    "*.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    TEMPLATE,
    CHAT_TEMPLATE,
)
_CODE = ("configuration_*.py", "modeling_*.py", "tokenization_*.py", "generation_*.py")


def copy_code(source: PathLike | None, target: Path) -> None:
    """Copies a checkpoint's own Python files, which transformers needs to load some families; we never run them.

    Args:
        source: the checkpoint's folder; None copies nothing.
        target: the folder that is being made.
    """
    if source is not None:
        copy_files(source, target, _CODE)


def point_auto_map_at(config: dict[str, Any], folder: Path, repository: str | None) -> None:
    """Changes config.json's auto_map so that it names a repository for each Python file that is not in the folder.

    A checkpoint that was downloaded from the hub comes without code; transformers can then load the code from the repository.

    Args:
        config: the content of config.json; changed in place.
        folder: the folder of the export, with its code already in it.
        repository: the hub name of the repository with the family's code; None where transformers needs no such code.
    """
    named = config.get("auto_map")
    if repository is None or not isinstance(named, dict):
        return
    config["auto_map"] = {
        kind: f"{repository}--{place}"
        if isinstance(place, str) and "--" not in place and not (folder / f"{place.split('.')[0]}.py").exists()
        else place
        for kind, place in named.items()
    }


def copy_origin(source: PathLike, target: Path) -> None:
    """Copies the model code, generation config and model card of the checkpoint that a run starts from, which an export will need.

    Args:
        source: a Hugging Face folder, or the folder of such copies in an earlier run.
        target: the folder to make.
    """
    copy_files(source, target, (*_CODE, GENERATION, CARD))


def copy_tokenizer(source: PathLike | None, target: Path, trained: Trained | None) -> None:
    """Copies a tokenizer's files and its chat template.

    Args:
        source: the tokenizer's folder; None copies nothing.
        target: the folder that is being made.
        trained: holds the chat template that is written in place of the tokenizer's own; None for that.

    Raises:
        UserError: there is no folder ``source``.
    """
    if source is None:
        return
    folder = as_path(source)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of the tokenizer's files")
    copy_files(folder, target, _TOKENIZER)
    if trained is not None:
        (target / CHAT_TEMPLATE).write_text(trained.chat_template, encoding="utf-8")
    elif (target / TEMPLATE).exists() and not (target / CHAT_TEMPLATE).exists():
        shutil.copyfile(target / TEMPLATE, target / CHAT_TEMPLATE)


def merged_generation_config(
    source: PathLike | None, arch: Architecture, trained: Trained | None = None
) -> dict[str, Any]:
    """Returns the content of an export's generation_config.json: that of the origin, completed by what was trained.

    Args:
        source: the folder that may hold the origin's generation config; None for no origin.
        arch: the architecture, which gives the special ids. Its end-of-sequence ids are always among the ids that end a
            response, and its mask token replaces the origin's.
        trained: holds the other ids that end a response, and further keys; None for neither.

    Returns:
        The dict to write.
    """
    origin: dict[str, Any] = {}
    if source is not None and (as_path(source) / GENERATION).exists():
        origin = dict(read_json(as_path(source) / GENERATION))
    bos = json.loads(dict(arch.extra).get("bos_token_id", "null"))
    known = {"bos_token_id": bos, "pad_token_id": arch.pad_id, **origin, "mask_token_id": arch.mask_id}
    ends = origin.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    ends = ends or [arch.eos_id, *arch.end_ids]
    ends = list(dict.fromkeys([*ends, arch.eos_id, *(() if trained is None else trained.stop_ids)]))
    known["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    known = {name: value for name, value in known.items() if value is not None or name in origin}
    return known if trained is None else {**known, **trained.settings}

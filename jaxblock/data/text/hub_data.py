"""Loads data sets by name through the `datasets` library."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from jaxblock.errors import UserError, install_command

HUB = "hf:"
_HUB_NAME = re.compile(
    r"hf:(?P<name>[^@:#]+)(@(?P<revision>[^@:#]+))?(:(?P<config>[^@:#]+))?(#(?P<split>[^#]+))?", re.ASCII
)


class HubTable(NamedTuple):
    """Holds a data set.

    Attributes:
        rows: The data set, a sequence of records.
        where: Its name for error messages.
        name: Its name in the source of a record.
    """

    rows: Any
    where: str
    name: str


def load_table(path: str, split: str) -> HubTable:
    """Loads a data set.

    Args:
        path: "hf:NAME[@REVISION][:CONFIG][#SPLIT]", where NAME may be a local folder that `datasets` can read.
        split: The split to load where the path does not name one.

    Raises:
        UserError: If the path has another form, the library is not installed, or it cannot load the data set.
    """
    found = _HUB_NAME.fullmatch(path)
    if found is None:
        raise UserError(
            f"{path!r} names no data set: write hf:NAME[@REVISION][:CONFIG][#SPLIT], as in hf:openai/gsm8k:main#train"
        )
    name, split = found["name"], found["split"] or split
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path} needs the datasets library: {install_command('datasets')}, or download the files and give their path"
        ) from error
    try:
        table = datasets.load_dataset(name, found["config"], split=split, revision=found["revision"])
    except Exception as error:  # the library raises its own exceptions and those of several network libraries
        first = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"cannot load {path} (split {split!r}) through the datasets library: {type(error).__name__}: {first}. Without "
            "a network, download the files elsewhere and give their path"
        ) from error
    folder = name.rstrip("/").split("/")[-1]
    return HubTable(table, f"{path} (split {split}) ", f"{folder}/{split}")

"""Defines the model card that every export has: a README.md with a YAML header for the Hugging Face hub, and sections of text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import huggingface_hub
import yaml

from jaxblock.io.files import read_bytes
from jaxblock.io.paths import PathLike, as_path
from jaxblock.io.signed_text import is_signed, signed, unsigned

CARD = "README.md"
"""The name of a model card's file."""

LICENCE = ("license", "license_name", "license_link")
"""The fields of a card's header that state a licence."""


@dataclass(frozen=True)
class Card:
    """Holds the content of a model card.

    Attributes:
        header: the fields of the YAML header, as ``huggingface_hub.ModelCardData`` takes them.
        sections: the Markdown text of each section, by its heading, in order.
    """

    header: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)

    def text(self, title: str, summary: str) -> str:
        """Returns the content of README.md, with our signature.

        Args:
            title: the model's name.
            summary: the Markdown text above the first section.
        """
        header = huggingface_hub.ModelCardData(model_name=title, **self.header).to_yaml()
        sections = (f"## {heading}\n\n{text.strip()}" for heading, text in self.sections.items())
        return signed("\n\n".join([f"---\n{header}\n---", f"# {title}", summary, *sections]) + "\n")


def read_header(folder: PathLike) -> dict[str, Any]:
    """Returns the header of the model card in a folder, whoever wrote it; {} where there is none that can be read."""
    path = as_path(folder) / CARD
    if not path.is_file():
        return {}
    text = read_bytes(path).decode("utf-8-sig", "replace")
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    try:
        header = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def read_licence(folder: PathLike) -> dict[str, str]:
    """Returns those fields of the header of a folder's model card that state a licence; {} where it states none."""
    header = read_header(folder)
    found = {name: header[name] for name in LICENCE if isinstance(header.get(name), str) and header[name].strip()}
    return found if found.get("license", "unknown") != "unknown" else {}


def read_own_card(folder: PathLike) -> Card | None:
    """Reads the card of an earlier export of ours, also if it was edited since; None where we did not write it."""
    path = as_path(folder) / CARD
    if not path.is_file() or not is_signed(content := read_bytes(path)):
        return None
    try:
        text = unsigned(content)
        data = vars(huggingface_hub.ModelCard(text).data)
    except (ValueError, TypeError, yaml.YAMLError, RecursionError):  # what a user's edit may have made of the header
        return None
    header = {name: value for name, value in data.items() if value is not None and name != "model_name"}
    _, *parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return Card(header, dict(zip(map(str.strip, parts[::2]), map(str.strip, parts[1::2]), strict=True)))

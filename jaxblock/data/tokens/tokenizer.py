"""Defines `Tokenizer`, the interface to the tokenizers of the `tokenizers` and SentencePiece libraries."""

from __future__ import annotations

import abc
import hashlib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

from jaxblock.errors import UserError
from jaxblock.io.folders import write_files
from jaxblock.io.json_text import parse_json

MASK, EOS, EOT, BOS = "<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>", "<|startoftext|>"
"""The special tokens of LLaDA; a tokenizer trained here has them unless the config names others."""


class Tokenizer(abc.ABC):
    """Converts between text and ids; an instance is made from the bytes of a tokenizer's files.

    Attributes:
        files: The content of the tokenizer's files by name, as `save` writes them.
        settings: The content of tokenizer_config.json and special_tokens_map.json, with the text of chat_template.jinja
            under "chat_template"; empty without these files.
        vocab_size: The number of rows that an embedding table needs: the largest id + 1.
        special_texts: The texts of the special tokens, which a record's own text must not contain.
    """

    vocab_size: int
    special_texts: frozenset[str]

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        """Keeps the files and reads the settings among them.

        Raises:
            UserError: If a settings file cannot be read; the message begins with `where`.
        """
        self.files: Mapping[str, bytes] = dict(files)
        self.settings: Mapping[str, Any] = read_settings(files, where)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the files: another process makes the tokenizer of them again."""
        return type(self), (self.files, "the tokenizer")

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; a special token's text becomes its id, and nothing is added at either end."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        """Returns the text of ids, with or without the texts of special tokens."""

    @abc.abstractmethod
    def id_of(self, token_text: str) -> int | None:
        """Returns the id of the token with exactly this text; None if there is no such token."""

    @abc.abstractmethod
    def piece(self, token_id: SupportsIndex) -> str:
        """Returns how the vocabulary writes a token, for display."""

    @abc.abstractmethod
    def definition(self) -> dict[str, Any]:
        """Returns all that decides which ids a text becomes, as JSON values; equal for tokenizers that do the same."""

    def main_file(self) -> tuple[str, str]:
        """Returns the name and the SHA-256 of the file that holds the vocabulary."""
        name = next(name for name in ("tokenizer.json", "tokenizer.model") if name in self.files)
        return name, hashlib.sha256(self.files[name]).hexdigest()

    def save(self, folder: pathlib.Path) -> None:
        """Writes the tokenizer's files into a local folder, from which `load_tokenizer` reads them."""
        write_files(folder, self.files)


def read_settings(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """Reads a tokenizer's settings from its files; tokenizer_config.json overrides the older special_tokens_map.json.

    Raises:
        UserError: If a file is not JSON or not UTF-8; the message begins with `where`.
    """
    try:
        older = parse_json(files.get("special_tokens_map.json", b"{}"))
        settings = {**older, **parse_json(files.get("tokenizer_config.json", b"{}"))}
        if "chat_template.jinja" in files:
            settings["chat_template"] = files["chat_template.jinja"].decode("utf-8-sig")
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{where}: the tokenizer_config.json, special_tokens_map.json or chat_template.jinja beside it cannot be read ({error})"
        ) from error
    return dict(settings)


def token_text(token: Any) -> str | None:
    """Returns a token's text as tokenizer_config.json gives it: a string, or an object with the field "content"."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None

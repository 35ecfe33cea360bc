"""Tokenizers behind one face: a SentencePiece model (trained here or given) or a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import tokenizers as huggingface

from jaxblock import storage
from jaxblock.config import DataConfig
from jaxblock.data.pieces import SentencePieceTokenizer, train_model
from jaxblock.errors import UserError

_BOS = "<|startoftext|>"
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table needs: the largest id + 1."""
        ...

    @property
    def special_texts(self) -> frozenset[str]:
        """Texts of control tokens, which a record's own text must not hold."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """The tokenizer_config.json that came along (and its chat template as "chat_template"); empty if none did."""
        ...

    @property
    def files(self) -> Mapping[str, bytes]:
        """The tokenizer's files by name, as `save` writes them."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; a special token's text becomes its id, and nothing is added."""
        ...

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        """Text of ids, with or without that of special tokens."""
        ...

    def id_of(self, token_text: str) -> int | None:
        """The id of exactly this token, or None."""
        ...

    def piece(self, token_id: SupportsIndex) -> str:
        """How one token is written in the vocabulary, for display."""
        ...

    def save(self, folder: pathlib.Path) -> None:
        """Writes the tokenizer's files, which `load` reads, into a local folder."""
        ...


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` run by the `tokenizers` library."""

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        """Reads a tokenizer from its files' bytes by name; "tokenizer.json" must be among them.

        Raises:
            UserError: If they are not a tokenizer's.
        """
        self._files = dict(files)
        try:
            self._tokenizer = huggingface.Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{where}: not a Hugging Face tokenizer.json ({error})") from error
        self._settings = _settings(self._files, where)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps

    @property
    def special_texts(self) -> frozenset[str]:
        return self._special

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._settings

    @property
    def files(self) -> Mapping[str, bytes]:
        return self._files

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def id_of(self, token_text: str) -> int | None:
        return self._tokenizer.token_to_id(token_text)

    def piece(self, token_id: SupportsIndex) -> str:
        return self._tokenizer.id_to_token(int(token_id)) or f"<{int(token_id)}>"

    def save(self, folder: pathlib.Path) -> None:
        storage.write_files(folder, self._files)


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that the method needs.

    Attributes:
        mask: The mask token.
        eos: End of sequence: fills the rest of the terminator's block.
        eot: End of turn: ends a response.
        pad: Padding; the tokenizer's own, else `eos`. Nothing that the model sees is padded.
    """

    mask: int
    eos: int
    eot: int
    pad: int

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a response, each once."""
        return (self.eot,) if self.eot == self.eos else (self.eot, self.eos)


def special_ids(tokenizer: Tokenizer, config: DataConfig) -> SpecialIds:
    """Finds the special tokens that the config names.

    Raises:
        UserError: If one is missing (naming the field to set), or the mask is used for something else too.
    """
    found = {}
    needs = {
        "mask": "set it to the token the checkpoint was trained with (the one its config calls mask_token_id; the "
        "model must know it)",
        "eos": "set it to the tokenizer's end-of-sequence token (LLaDA pads with it too)",
        "eot": "set it to the token that ends an assistant turn",
    }
    for name, advice in needs.items():
        text = getattr(config, f"{name}_token")
        token_id = tokenizer.id_of(text) if text else None
        if token_id is None:
            known = ", ".join(sorted(tokenizer.special_texts)[:20]) or "none"
            raise UserError(
                f"data.{name}_token: the tokenizer {config.tokenizer!r} has no token {text!r}; {advice}. Its "
                f"special tokens: {known}"
            )
        found[name] = token_id
    if found["mask"] in (found["eos"], found["eot"]):
        raise UserError(
            f"data.mask_token: {config.mask_token!r} is also the end-of-sequence or end-of-turn token; the mask "
            "must be a token of its own"
        )
    pad_text = text_of(tokenizer.settings.get("pad_token"))
    pad = tokenizer.id_of(pad_text) if pad_text else None
    return SpecialIds(**found, pad=found["eos"] if pad is None or pad == found["mask"] else pad)


def bos_text(tokenizer: Tokenizer) -> str:
    """The text that begins a conversation: the tokenizer's own, else LLaDA's if the vocabulary has it, else nothing."""
    named = text_of(tokenizer.settings.get("bos_token"))
    return named or (_BOS if tokenizer.id_of(_BOS) is not None else "")


def text_of(token: Any) -> str | None:
    """A token's text as tokenizer_config.json gives it: a string, or an object with "content"."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def train(texts: Iterable[str], config: DataConfig, extra_symbols: Sequence[str] = ()) -> SentencePieceTokenizer:
    """Fits a SentencePiece model in which every text round-trips and each special token is one token.

    Args:
        texts: Rendered conversations, special tokens included.
        config: Type, vocabulary size and special tokens.
        extra_symbols: More special tokens (those that the chat template writes).

    Raises:
        UserError: If the vocabulary is too small for the text's letters, bytes and special tokens.
    """
    symbols = dict.fromkeys([config.mask_token, config.eos_token, config.eot_token, _BOS, *extra_symbols])
    return SentencePieceTokenizer(
        {
            "tokenizer.model": train_model(
                texts,
                model_type=config.tokenizer_type,
                vocab_size=config.vocab_size,
                split_digits=config.split_digits,
                symbols=tuple(symbols),
            )
        },
        {},
        "the trained tokenizer",
    )


def load(path: storage.PathLike) -> Tokenizer:
    """Reads a tokenizer: a SentencePiece .model, a tokenizer.json, or a folder that holds either (tokenizer.json wins).

    Files of these names beside it come along: tokenizer_config.json, special_tokens_map.json, chat_template.jinja.

    Raises:
        UserError: If there is none or it cannot be read.
    """
    name = os.fspath(path)
    target = storage.as_path(path)
    with storage.explained("read the tokenizer", path):
        if target.is_dir():
            names = [
                "tokenizer.json",
                *sorted(entry.name for entry in target.iterdir() if entry.name.endswith(".model")),
            ]
            main = next((target / entry for entry in names if (target / entry).exists()), None)
            if main is None:
                raise UserError(
                    f"data.tokenizer: the folder {name} holds neither tokenizer.json nor a SentencePiece .model"
                )
        elif target.exists():
            main = target
        else:
            raise UserError(
                f"data.tokenizer: {name} does not exist; give `train`, a .model, a tokenizer.json, or a folder with one"
            )
        files = {entry: (main.parent / entry).read_bytes() for entry in _COMPANIONS if (main.parent / entry).exists()}
        content = main.read_bytes()
    if main.suffix == ".json":
        return HuggingFaceTokenizer({**files, "tokenizer.json": content}, os.fspath(main))
    if main.suffix == ".model":
        files["tokenizer.model"] = content
        return SentencePieceTokenizer(files, _settings(files, os.fspath(main)), os.fspath(main))
    raise UserError(f"data.tokenizer: {os.fspath(main)} is neither a SentencePiece .model nor a tokenizer.json")


def _settings(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    try:
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        if "chat_template.jinja" in files:
            settings["chat_template"] = files["chat_template.jinja"].decode()
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{where}: the tokenizer_config.json or chat_template.jinja beside it cannot be read ({error})"
        ) from error
    return dict(settings)

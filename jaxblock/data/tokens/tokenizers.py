"""Tokenizers behind one face: a SentencePiece model (trained here or given) or a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import tokenizers as huggingface

from jaxblock.data.config import DataConfig
from jaxblock.data.tokens import merges
from jaxblock.data.tokens.pieces import SentencePieceTokenizer, train_model
from jaxblock.errors import UserError
from jaxblock.io.folders import write_files
from jaxblock.io.hub import local_checkpoint
from jaxblock.io.paths import PathLike, as_path, explained

MASK, EOS, EOT, BOS = "<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>", "<|startoftext|>"
"""Special tokens of a tokenizer that is trained here, where the config gives them no other names; LLaDA's."""
# The last three are the older files of the same tokenizer, which some of transformers' classes still read.
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    *merges.FILES,
)


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
        write_files(folder, self._files)

    def with_special_token(self, text: str, name: str) -> HuggingFaceTokenizer:
        """Another tokenizer with one more special token, whose id is this one's `vocab_size`.

        Args:
            text: The token.
            name: What the tokenizer's settings call it ("mask_token"); its files say so too.

        Raises:
            UserError: If ids of the vocabulary are missing, so that the library would give the token another id.
        """
        tokenizer = huggingface.Tokenizer.from_str(self._files["tokenizer.json"].decode())
        entry: dict[str, Any] = {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        }
        tokenizer.add_special_tokens([huggingface.AddedToken(**entry, special=True)])
        token_id = tokenizer.token_to_id(text)
        if token_id != self.vocab_size:
            raise UserError(
                f"cannot add {text!r} to the tokenizer: its ids have gaps, and {token_id} is not the first free id, "
                f"{self.vocab_size}; name an unused token instead"
            )
        files = {**self._files, "tokenizer.json": tokenizer.to_str(pretty=True).encode()}
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if file in files:
                settings = {**json.loads(files[file]), name: text}
                if "added_tokens_decoder" in settings:
                    added = {**settings["added_tokens_decoder"], str(token_id): {**entry, "special": True}}
                    settings["added_tokens_decoder"] = added
                files[file] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
        if "added_tokens.json" in files:
            added = {**json.loads(files["added_tokens.json"]), text: token_id}
            files["added_tokens.json"] = json.dumps(added, indent=2, ensure_ascii=False).encode()
        return HuggingFaceTokenizer(files, f"the tokenizer with {text!r} added")


def bos_text(tokenizer: Tokenizer) -> str:
    """The text that begins a conversation: the tokenizer's own, else LLaDA's if the vocabulary has it, else nothing."""
    named = text_of(tokenizer.settings.get("bos_token"))
    return named or (BOS if tokenizer.id_of(BOS) is not None else "")


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
    named = (config.mask_token or MASK, config.eos_token or EOS, config.eot_token or EOT)
    symbols = dict.fromkeys([*named, BOS, *extra_symbols])
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


def present(folder: PathLike) -> bool:
    """Whether a folder holds what `load` reads a tokenizer from."""
    names = {entry.name for entry in as_path(folder).iterdir()}
    return "tokenizer.json" in names or "merges.txt" in names or any(name.endswith(".model") for name in names)


def load(path: PathLike) -> Tokenizer:
    """Reads a tokenizer: a SentencePiece .model, a tokenizer.json, or a folder (or hub name) that holds one.

    In a folder tokenizer.json comes first, then vocab.json with merges.txt (of a Qwen2 tokenizer, as Dream ships it), then
    a .model.

    Files of these names beside it come along: tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
    added_tokens.json, vocab.json and merges.txt.

    Raises:
        UserError: If there is none or it cannot be read.
    """
    name = local_checkpoint(path, weights=False)
    target = as_path(name)
    with explained("read the tokenizer", name):
        if target.is_dir():
            models = sorted(entry.name for entry in target.iterdir() if entry.name.endswith(".model"))
            names = ["tokenizer.json", "merges.txt", *models]
            main = next((target / entry for entry in names if (target / entry).exists()), None)
            if main is None:
                raise UserError(
                    f"data.tokenizer: the folder {name} holds neither tokenizer.json, nor vocab.json with merges.txt, "
                    "nor a SentencePiece .model"
                )
        elif target.exists():
            main = target
        else:
            raise UserError(
                f"data.tokenizer: {name} does not exist; give `train`, a .model, a tokenizer.json, or a folder with one"
            )
        files = {entry: (main.parent / entry).read_bytes() for entry in _COMPANIONS if (main.parent / entry).exists()}
        content = main.read_bytes()
    if main.name == "merges.txt":
        made = merges.tokenizer_json(files, _settings(files, name), name)
        return HuggingFaceTokenizer({**files, "tokenizer.json": made}, name)
    if main.suffix == ".json":
        return HuggingFaceTokenizer({**files, "tokenizer.json": content}, os.fspath(main))
    if main.suffix == ".model":
        files["tokenizer.model"] = content
        return SentencePieceTokenizer(files, _settings(files, os.fspath(main)), os.fspath(main))
    raise UserError(f"data.tokenizer: {os.fspath(main)} is neither a SentencePiece .model nor a tokenizer.json")


def _settings(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    try:
        older = json.loads(files.get("special_tokens_map.json", b"{}"))
        settings = {**older, **json.loads(files.get("tokenizer_config.json", b"{}"))}
        if "chat_template.jinja" in files:
            settings["chat_template"] = files["chat_template.jinja"].decode()
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{where}: the tokenizer_config.json, special_tokens_map.json or chat_template.jinja beside it cannot be read ({error})"
        ) from error
    return dict(settings)

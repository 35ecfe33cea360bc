"""Defines `HuggingFaceTokenizer`, which runs a tokenizer.json with the `tokenizers` library."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

import tokenizers

from jaxblock.data.tokens.added_tokens import add_declared, declared_tokens
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.errors import UserError, first_line


class HuggingFaceTokenizer(Tokenizer):
    """Runs the tokenizer that a tokenizer.json describes."""

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        """Makes the tokenizer from the bytes of its files by name, one of which is "tokenizer.json".

        Raises:
            UserError: If the files do not describe a tokenizer; the message begins with `where`.
        """
        with _library_errors(f"{where}: not a Hugging Face tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{where}: not a Hugging Face tokenizer.json (its vocabulary is empty)")
        if getattr(self._tokenizer.model, "dropout", None):
            raise UserError(
                f"{where}: model.dropout in tokenizer.json cuts a text in another way each time: set it to null there"
            )
        super().__init__(files, where)
        add_declared(self._tokenizer, declared_tokens(files, where), where)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps
        self._drops_letters = _drops_letters(self._tokenizer.model, vocabulary)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.special_texts = frozenset(token.content for token in added if token.special)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, in which special tokens stand for themselves; raises UserError where it cannot be encoded."""
        with _library_errors("the tokenizer cannot encode the text"):
            found = self._tokenizer.encode(text, add_special_tokens=False)
        if self._drops_letters:
            kept = {at for begin, end in found.offsets for at in range(begin, end)}
            lost = next((at for at, letter in enumerate(text) if at not in kept and not letter.isspace()), None)
            if lost is not None:
                raise UserError(
                    f"the tokenizer has no token for {text[lost]!r} at character {lost} and none for unknown letters: it would "
                    "leave the letter out"
                )
        return list(found.ids)

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def id_of(self, token_text: str) -> int | None:
        return self._tokenizer.token_to_id(token_text)

    def piece(self, token_id: SupportsIndex) -> str:
        return self._tokenizer.id_to_token(int(token_id)) or f"<{int(token_id)}>"

    def definition(self) -> dict[str, Any]:
        return dict(json.loads(self._tokenizer.to_str()))

    def with_special_token(self, text: str, name: str) -> HuggingFaceTokenizer:
        """Returns a tokenizer with one more special token, whose id is the `vocab_size` of this one.

        Args:
            text: The new token's text.
            name: The token's name in the tokenizer's settings files, to which it is added, as in "mask_token".

        Raises:
            UserError: If the vocabulary's ids have gaps, so that the library would give the token another id.
        """
        tokenizer = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"].decode())
        add_declared(tokenizer, declared_tokens(self.files, "the tokenizer"), "the tokenizer")
        entry: dict[str, Any] = {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        }
        tokenizer.add_special_tokens([tokenizers.AddedToken(**entry, special=True)])
        token_id = tokenizer.token_to_id(text)
        if token_id != self.vocab_size:
            raise UserError(
                f"cannot add {text!r} to the tokenizer: its ids have gaps, and {token_id} is not the first free id, "
                f"{self.vocab_size}; name an unused token instead"
            )
        files = {**self.files, "tokenizer.json": tokenizer.to_str(pretty=True).encode()}
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if file in files:
                settings = {**json.loads(files[file]), name: text}
                if "added_tokens_decoder" in settings:
                    settings["added_tokens_decoder"] |= {str(token_id): {**entry, "special": True}}
                files[file] = _json_bytes(settings)
        if "added_tokens.json" in files:
            files["added_tokens.json"] = _json_bytes({**json.loads(files["added_tokens.json"]), text: token_id})
        return HuggingFaceTokenizer(files, f"the tokenizer with {text!r} added")


def _json_bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


@contextlib.contextmanager
def _library_errors(problem: str) -> Iterator[None]:
    """Turns the library's errors, which are plain Exceptions or panics of its Rust code, into a UserError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{problem} ({first_line(error)})") from error
        raise


def _drops_letters(model: Any, vocabulary: Mapping[str, int]) -> bool:
    """Tells whether a model leaves letters out that its vocabulary lacks: BPE without bytes and without an unknown token does."""
    if not isinstance(model, tokenizers.models.BPE) or model.unk_token is not None or model.byte_fallback:
        return False
    return not all(letter in vocabulary for letter in tokenizers.pre_tokenizers.ByteLevel.alphabet())

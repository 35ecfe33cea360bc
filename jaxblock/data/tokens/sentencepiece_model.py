"""Wraps SentencePiece models, and trains models that reproduce every text exactly."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, SupportsIndex

import sentencepiece

from jaxblock.data.config import DataConfig
from jaxblock.data.tokens.added_tokens import declared_tokens
from jaxblock.data.tokens.tokenizer import BOS, EOS, EOT, MASK, Tokenizer
from jaxblock.errors import UserError

_SPACE = "\u2581"  # the character that SentencePiece puts in place of a space
_SPACE_BYTES = tuple(f"<0x{byte:02X}>" for byte in _SPACE.encode())
# Appended to a model, this says once more what its settings of normalisation (field 3) are: no dummy prefix (field 3 in them).
# Where a message is there twice, protobuf takes each of its fields from the last one that has it.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
Spaces = Literal["model", "each", "first", "none"]
"""Where a space is put before a text: as the model says, before each part between special tokens, at the beginning, or nowhere."""

_BRACKETED = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")


def train_tokenizer(
    texts: Iterable[str], config: DataConfig, extra_symbols: Sequence[str] = ()
) -> SentencePieceTokenizer:
    """Fits a SentencePiece model with identity normalisation and byte fallback, so that every text round-trips.

    A vocabulary that the text cannot fill ends up smaller than asked.

    Args:
        texts: The rendered conversations, special tokens included.
        config: The data settings, which give the model's type, its vocabulary size (which counts the 256 bytes, the
            unknown piece, the newline and all special tokens) and the special tokens' texts.
        extra_symbols: Other texts that become one token each: the special tokens that the chat template writes.

    Raises:
        UserError: If the vocabulary is too small for the text's letters, bytes and special tokens, if a special token
            is not in brackets, or if there is no text to train on.
    """
    named = (config.mask_token or MASK, config.eos_token or EOS, config.eot_token or EOT)
    symbols = list(dict.fromkeys([*named, BOS, *extra_symbols]))
    for symbol in symbols:
        if not _BRACKETED.fullmatch(symbol):
            raise UserError(f"the special token {symbol!r} of a trained tokenizer must be in brackets, as in <|name|>")
    symbols.append("\n")
    least = 256 + 1 + len(symbols) + 1
    if config.vocab_size < least:
        raise UserError(
            f"data.vocab_size = {config.vocab_size} is too small: bytes and special tokens alone need {least}"
        )
    split = re.compile("|".join(map(re.escape, symbols)))
    parts = [part for text in texts for part in split.split(text) if part]
    if not parts:
        raise UserError("the tokenizer cannot be trained: the training text is empty")
    return SentencePieceTokenizer({"tokenizer.model": _fit(parts, config, symbols)}, "the trained tokenizer")


def _fit(parts: Iterable[str], config: DataConfig, symbols: Sequence[str]) -> bytes:
    """Fits the model to pieces of text that contain no special token; returns the bytes of the model file."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts),
            model_writer=model,
            model_type=config.tokenizer_type,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            split_digits=config.split_digits,
            user_defined_symbols=list(symbols),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 24,
            num_threads=4,  # a fixed number, so that every machine fits the same model
            minloglevel=2,
        )
    except RuntimeError as error:
        needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if needed:
            raise UserError(
                f"data.vocab_size = {config.vocab_size} is too small for the letters of the training text: set at least "
                f"{needed[1]}"
            ) from error
        raise UserError(
            f"the tokenizer cannot be trained (data.tokenizer_type = {config.tokenizer_type!r}): {error}"
        ) from error
    return model.getvalue()


class SentencePieceTokenizer(Tokenizer):
    """Runs a SentencePiece model. Control tokens in a text become their ids; models trained here reproduce every text."""

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        """Makes the tokenizer from the bytes of its files by name, one of which is "tokenizer.model".

        Raises:
            UserError: If the file is not a SentencePiece model; the message begins with `where`.
        """
        super().__init__(files, where)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
            self.vocab_size = self._model.get_piece_size()
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{where}: not a SentencePiece model ({error})") from error
        if not self.vocab_size:
            raise UserError(f"{where}: not a SentencePiece model")
        self._ids: dict[str, int] = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
        self._has_bytes = _SPACE_BYTES[0] in self._ids and self._model.is_byte(self._ids[_SPACE_BYTES[0]])
        self._special_ids = {i for text, i in self._ids.items() if self._is_special(text, i)} | self._declared(where)
        self.special_texts = frozenset(self._model.id_to_piece(i) for i in self._special_ids)
        self._space = self._place_of_spaces()
        self._encoder = self._model
        if self._space in ("first", "none"):
            self._encoder = sentencepiece.SentencePieceProcessor(
                model_proto=files["tokenizer.model"] + _NO_DUMMY_PREFIX
            )
        self._split = self._splitter()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, in which special tokens stand for themselves."""
        if self._space == "first" and not text.startswith((" ", _SPACE, *self.special_texts)):
            text = " " + text if text else text
        ids: list[int] = []
        for part in self._split.split(text) if self._split else [text]:
            if part == _SPACE and self._has_bytes and self._space == "model":
                ids += [self._ids[byte] for byte in _SPACE_BYTES]
            elif part in self.special_texts or part == "\n" and part in self._ids and self._space == "model":
                ids.append(self._ids[part])
            elif part:
                ids += self._with_real_spaces(self._encoder.encode(part))
        return ids

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        wanted = [int(i) for i in ids if not (skip_special and int(i) in self._special_ids)]
        return str((self._encoder if self._space == "none" else self._model).decode(wanted))

    def id_of(self, token_text: str) -> int | None:
        return self._ids.get(token_text)

    def piece(self, token_id: SupportsIndex) -> str:
        return str(self._model.id_to_piece(int(token_id)))

    def definition(self) -> dict[str, Any]:
        return {"model": hashlib.sha256(self.files["tokenizer.model"]).hexdigest(), "space": self._space}

    def _declared(self, where: str) -> set[int]:
        """Returns the ids of the pieces that the settings beside the model call special.

        Raises:
            UserError: the settings add a token that the model lacks.
        """
        declared = declared_tokens(self.files, where)
        new = [token.content for _, token in declared if token.content not in self._ids]
        if new:
            raise UserError(
                f"{where}: the settings beside it add {', '.join(map(repr, new[:5]))}, which a SentencePiece model cannot take; "
                "make a tokenizer.json in transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        ids = {self._ids[token.content] for _, token in declared if token.special}
        return {i for i in ids if not self._model.is_unknown(i)}

    def _place_of_spaces(self) -> Spaces:
        """Returns where a space is put before a text: transformers' Llama tokenizers do not follow the model alone."""
        if self._model.normalize("a") == "a" or self.settings.get("tokenizer_class") not in _LLAMA_CLASSES:
            return "model"
        if self.settings.get("add_prefix_space") is False:
            return "none"
        return "first" if self.settings.get("legacy") is False else "each"

    def _is_special(self, text: str, i: int) -> bool:
        """Tells whether a piece is special: a control piece, or one in brackets (<|eot_id|>) that the model finds in a text."""
        if self._model.is_unknown(i) or self._model.is_byte(i):
            return False
        return self._model.is_control(i) or (_BRACKETED.fullmatch(text) is not None and i in self._model.encode(text))

    def _splitter(self) -> re.Pattern[str] | None:
        """Returns a pattern of the texts at which `encode` splits, which the model does not encode; None for no splits.

        A model with a dummy prefix puts a space before every part that it encodes. With such a model `encode` splits only at
        control tokens, which the model does not find in a text, unless it follows transformers' Llama tokenizers, which split
        at all special tokens.
        """
        if self._space != "model":
            return _any_of(self.special_texts)
        dummy_prefix = self._model.normalize("a") != "a"
        apart = [text for text in self.special_texts if not dummy_prefix or self._model.is_control(self._ids[text])]
        if not dummy_prefix:
            apart += [text for text in ("\n", _SPACE) if self._has_bytes or text in self._ids]
        return _any_of(apart)

    def _with_real_spaces(self, ids: list[int]) -> list[int]:
        """Replaces the bytes of ▁ (U+2581) by the byte of a space.

        SentencePiece puts ▁ in place of a space. Where byte fallback writes it as its three bytes, they would decode to ▁.
        """
        if not self._has_bytes:
            return ids
        first, second, third = (self._ids[byte] for byte in _SPACE_BYTES)
        if first not in ids:
            return ids
        replaced: list[int] = []
        for i in ids:
            replaced.append(i)
            if replaced[-3:] == [first, second, third]:
                replaced[-3:] = [self._ids["<0x20>"]]
        return replaced


def _any_of(texts: Collection[str]) -> re.Pattern[str] | None:
    """Returns a pattern that finds any of some texts, the longest first; None for no texts."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

"""SentencePiece: training a model that loses nothing, and a tokenizer that round-trips every text."""

from __future__ import annotations

import io
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import sentencepiece

from jaxblock.errors import UserError
from jaxblock.io.folders import write_files

_SPACE = "\u2581"  # SentencePiece's own sign for a space
_SPACE_BYTES = tuple(f"<0x{byte:02X}>" for byte in _SPACE.encode())
_BRACKETED = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")


def train_model(
    texts: Iterable[str], *, model_type: str, vocab_size: int, split_digits: bool, symbols: Sequence[str]
) -> bytes:
    """Fits a model with identity normalisation, byte fallback and no unknown text.

    A vocabulary that the text cannot fill ends up smaller than asked.

    Args:
        texts: What to fit.
        model_type: "bpe", "unigram", "word" or "char".
        vocab_size: Most pieces, with 256 bytes, the unknown piece, the newline and `symbols` among them.
        split_digits: Every digit is a piece of its own.
        symbols: Texts that are one piece each wherever they stand.

    Returns:
        The model file's bytes.

    Raises:
        UserError: If `vocab_size` is too small, or nothing can be fitted.
    """
    for symbol in symbols:
        if not _BRACKETED.fullmatch(symbol):
            raise UserError(f"the special token {symbol!r} of a trained tokenizer must be in brackets, as in <|name|>")
    symbols = [*symbols, "\n"]
    least = 256 + 1 + len(symbols) + 1
    if vocab_size < least:
        raise UserError(f"data.vocab_size = {vocab_size} is too small: bytes and special tokens alone need {least}")
    split = re.compile("|".join(map(re.escape, symbols)))
    parts = [part for text in texts for part in split.split(text) if part]
    if not parts:
        raise UserError("the tokenizer cannot be trained: the training text is empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            split_digits=split_digits,
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
                f"data.vocab_size = {vocab_size} is too small for the letters of the training text: set at least "
                f"{needed[1]}"
            ) from error
        raise UserError(f"the tokenizer cannot be trained (data.tokenizer_type = {model_type!r}): {error}") from error
    return model.getvalue()


class SentencePieceTokenizer:
    """A SentencePiece model. Control tokens in a text become their ids; models trained here round-trip every text."""

    def __init__(self, files: Mapping[str, bytes], settings: Mapping[str, Any], where: str) -> None:
        """Reads a model from its files' bytes by name; "tokenizer.model" must be among them.

        Raises:
            UserError: If it is not a SentencePiece model.
        """
        self._files, self._settings = dict(files), settings
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
            self._size: int = self._model.get_piece_size()
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{where}: not a SentencePiece model ({error})") from error
        if not self._size:
            raise UserError(f"{where}: not a SentencePiece model")
        self._ids: dict[str, int] = {self._model.id_to_piece(i): i for i in range(self._size)}
        self._special_ids = {i for text, i in self._ids.items() if self._is_special(text, i)}
        self._special = frozenset(self._model.id_to_piece(i) for i in self._special_ids)
        # A model with a dummy prefix would put one before each part that follows a split; there only what the model
        # itself cannot find, control tokens, is split off.
        dummy = self._model.normalize("a") != "a"
        apart = [text for text in self._special if not dummy or self._model.is_control(self._ids[text])]
        if not dummy:
            apart += [text for text in ("\n", _SPACE) if self._has_bytes or text in self._ids]
        self._split = (
            re.compile("(" + "|".join(map(re.escape, sorted(apart, key=len, reverse=True))) + ")") if apart else None
        )

    @property
    def vocab_size(self) -> int:
        return self._size

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
        ids: list[int] = []
        for part in self._split.split(text) if self._split else [text]:
            if part == _SPACE and self._has_bytes:
                ids += [self._ids[byte] for byte in _SPACE_BYTES]
            elif part in self._special or part == "\n" and part in self._ids:
                ids.append(self._ids[part])
            elif part:
                ids += self._with_real_spaces(self._model.encode(part))
        return ids

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        wanted = [int(i) for i in ids if not (skip_special and int(i) in self._special_ids)]
        return str(self._model.decode(wanted))

    def id_of(self, token_text: str) -> int | None:
        return self._ids.get(token_text)

    def piece(self, token_id: SupportsIndex) -> str:
        return str(self._model.id_to_piece(int(token_id)))

    def save(self, folder: pathlib.Path) -> None:
        write_files(folder, self._files)

    @property
    def _has_bytes(self) -> bool:
        return _SPACE_BYTES[0] in self._ids and self._model.is_byte(self._ids[_SPACE_BYTES[0]])

    def _is_special(self, text: str, i: int) -> bool:
        """Control pieces, and bracketed ones such as <|eot_id|> that the model itself finds in a text."""
        if self._model.is_unknown(i) or self._model.is_byte(i):
            return False
        return self._model.is_control(i) or (_BRACKETED.fullmatch(text) is not None and i in self._model.encode(text))

    def _with_real_spaces(self, ids: list[int]) -> list[int]:
        """Mends spaces that fell back to bytes: SentencePiece writes its own sign's, which decode to that sign."""
        if not self._has_bytes:
            return ids
        first, second, third = (self._ids[byte] for byte in _SPACE_BYTES)
        if first not in ids:
            return ids
        mended: list[int] = []
        for i in ids:
            mended.append(i)
            if mended[-3:] == [first, second, third]:
                mended[-3:] = [self._ids["<0x20>"]]
        return mended

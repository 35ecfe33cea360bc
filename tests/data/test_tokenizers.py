"""Tokenizers lose nothing, find their special tokens, and say which field to set when one is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxblock.data.config import DataConfig
from jaxblock.data.tokens.find_special import find_special
from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.data.tokens.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from jaxblock.data.tokens.special import SpecialIds
from jaxblock.data.tokens.templates import template_source
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.errors import UserError


def _special(tokenizer: Tokenizer, config: DataConfig, **checkpoint: int) -> SpecialIds:
    return find_special(tokenizer, "chat", template_source("chat"), config, checkpoint)[1]


HARD_TEXTS = [
    "  two blanks first, one last ",
    "tab\t, line\r\nfeed\n\n, zero \0",
    "Où? “5 + 7” é e\u0301 😀 中文 \u0650",
    "SentencePiece's own space \u2581 and \u2581\u2581, a \u2585, \u2047, <unk>, <s>, <0x41>",
    "",
    " ",
]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "char"])
def test_every_model_type_round_trips(kind: str) -> None:
    texts = [f"Ada has {n} coins.\n{n} + 1 = {n + 1}" for n in range(60)]
    tokenizer = train_tokenizer(texts, DataConfig(tokenizer_type=kind, vocab_size=500))
    for text in texts + HARD_TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special=False) == text
        assert tokenizer.id_of("<unk>") not in ids
    assert 256 < tokenizer.vocab_size <= 500
    assert "\n" in [tokenizer.piece(i) for i in tokenizer.encode("1\n2")]


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_round_trips(pieces: SentencePieceTokenizer, text: str) -> None:
    assert pieces.decode(pieces.encode(text), skip_special=False) == text


def test_special_tokens_are_single_and_can_be_skipped(pieces: SentencePieceTokenizer) -> None:
    ids = pieces.encode("a<|eot_id|><|mdm_mask|> b")
    assert pieces.decode(ids) == "a b"
    assert [pieces.piece(i) for i in ids if i < 10] == ["<|eot_id|>", "<|mdm_mask|>"]
    ids = _special(pieces, DataConfig())
    assert (ids.mask, ids.eot) == (pieces.id_of("<|mdm_mask|>"), pieces.id_of("<|eot_id|>"))
    assert ids.pad == ids.eos == pieces.id_of("<|endoftext|>")
    assert ids.stop_ids == (ids.eot, ids.eos)


def test_digits_can_stand_alone() -> None:
    texts = ["12 + 34 = 46"] * 20
    for split, expected in [(False, ["12"]), (True, ["1", "2"])]:
        tokenizer = train_tokenizer(texts, DataConfig(vocab_size=400, split_digits=split))
        assert [tokenizer.piece(i) for i in tokenizer.encode("12")] == expected


@pytest.mark.parametrize(
    ("config", "texts", "complaint"),
    [
        ({"vocab_size": 200}, ["a"], "data.vocab_size = 200 is too small: bytes and special tokens alone need 263"),
        ({"vocab_size": 270}, ["abcdefghijklmnopqrstuvwxyz"] * 9, r"set at least 28\d"),
        ({"vocab_size": 300}, ["", "\n"], "the training text is empty"),
        ({"mask_token": "MASK"}, ["a"], "'MASK' of a trained tokenizer must be in brackets"),
    ],
)
def test_training_says_what_to_set(config: dict[str, object], texts: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        train_tokenizer(texts, DataConfig(**config))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mask", "eos", "eot"])
def test_a_missing_special_token_names_its_field(tokenizer_folder: Callable[..., str], name: str) -> None:
    config, text = DataConfig(), {"mask": "<|mdm_mask|>", "eos": "<|endoftext|>", "eot": "<|eot_id|>"}[name]
    tokenizer = load_tokenizer(tokenizer_folder(without=text))
    with pytest.raises(UserError, match=rf"data\.{name}_token: .* no token ") as caught:
        _special(tokenizer, dataclasses.replace(config, **{f"{name}_token": text}))
    assert ("mask_token_id" in str(caught.value)) == (name == "mask")


def test_the_mask_is_a_token_of_its_own(pieces: SentencePieceTokenizer) -> None:
    with pytest.raises(UserError, match="data.mask_token: '<|eot_id|>' is also"):
        _special(pieces, DataConfig(mask_token="<|eot_id|>"))
    same = _special(pieces, DataConfig(eos_token="<|eot_id|>"))
    assert same.stop_ids == (same.eot,)


def test_saved_tokenizers_load_the_same(
    tokenizer_folder: Callable[..., str], pieces: SentencePieceTokenizer, tmp_path: Path
) -> None:
    text = "Ada has 5 coins.\n<|eot_id|>é"
    for number, tokenizer in enumerate([pieces, load_tokenizer(tokenizer_folder())]):
        folder = tmp_path / str(number)
        tokenizer.save(folder)
        for path in [folder, *(folder / name for name in ("tokenizer.model", "tokenizer.json"))]:
            if path.exists():
                again = load_tokenizer(path)
                assert again.encode(text) == tokenizer.encode(text)
                assert again.decode(again.encode(text), skip_special=False) == text
                assert again.decode(again.encode(text)) == "Ada has 5 coins.\né"
                assert again.vocab_size == tokenizer.vocab_size > max(again.encode(text))
                assert again.special_texts == tokenizer.special_texts
                assert again.settings == tokenizer.settings


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    (tmp_path / "bad.txt").write_text("")
    for name, complaint in [
        ("none", "does not exist; give `train`"),
        ("empty", "holds neither tokenizer.json, nor vocab.json with merges.txt, nor"),
        ("bad.json", "not a Hugging Face tokenizer.json"),
        ("bad.model", "not a SentencePiece model"),
        ("bad.txt", "neither a SentencePiece .model nor"),
    ]:
        with pytest.raises(UserError, match=complaint):
            load_tokenizer(tmp_path / name)

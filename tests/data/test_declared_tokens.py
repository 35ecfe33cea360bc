"""Tests tokens that only a checkpoint's settings declare, and spaces at special tokens, against what transformers makes of them."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.errors import UserError

# Where it is installed (benchmarks/requirements.txt), what is expected below is compared with what it does.
transformers = importlib.import_module("transformers") if importlib.util.find_spec("transformers") else None


def entry(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


A, B, END = "<|a|>", "<|b|>", "<|eot_id|>"
TEXT = f"1{A} {B} 2{END} 3"
BOTH = ["1", A, "Ġ", B, "Ġ2", END, "Ġ3"]
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# The files beside a tokenizer.json of 600 tokens, and the pieces of TEXT.
DECLARED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "with ids": ({CONFIG: {"added_tokens_decoder": {"601": entry(B), "600": entry(A)}}}, BOTH),
    "with flags": (
        {CONFIG: {"added_tokens_decoder": {"5": entry(END, rstrip=True), "600": entry(A), "601": entry(B, lstrip=True, special=False)}}},
        ["1", A, B, "Ġ2", END, "3"],
    ),
    "in a list": ({CONFIG: {"additional_special_tokens": [A, {"__type": "AddedToken", **entry(B)}]}}, BOTH),
    "in an object": ({CONFIG: {"extra_special_tokens": {"a_token": A, "b_token": B}}}, BOTH),
    "in the older file": ({CONFIG: {"additional_special_tokens": [A]}, ADDED: {B: 601, A: 600}}, BOTH),
    "in the older map": ({CONFIG: {"bos_token": A}, MAP: {"additional_special_tokens": [B]}}, BOTH),
    "as padding alone": (
        {CONFIG: {"pad_token": A, "added_tokens_decoder": {}}, MAP: {"additional_special_tokens": [B]}}, [],
    ),
}  # fmt: skip


@pytest.fixture
def declared(tokenizer_folder: Callable[..., str]) -> Callable[[dict[str, Any]], Path]:
    def make(files: dict[str, Any]) -> Path:
        folder = Path(tokenizer_folder())
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        return folder

    return make


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.piece(i) for i in tokenizer.encode(text)]


@pytest.mark.parametrize("case", DECLARED)
def test_declared_tokens_are_added(declared: Any, case: str) -> None:
    files, pieces = DECLARED[case]
    folder = declared(files)
    tokenizer = load_tokenizer(folder)
    if pieces:
        assert pieces_of(tokenizer, TEXT) == pieces and tokenizer.vocab_size == 602
        assert {A, END} <= tokenizer.special_texts and (B in tokenizer.special_texts) == (
            case not in ("with flags", "in the older file")
        )
        assert tokenizer.id_of(A) == 600 or case == "in the older map"
    else:
        assert tokenizer.vocab_size == 600
    masked = tokenizer.with_special_token("<|m|>", "mask_token")  # type: ignore[attr-defined]
    assert masked.encode(TEXT) == tokenizer.encode(TEXT) and masked.id_of("<|m|>") == tokenizer.vocab_size
    # There, padding would get an id for which an embedding has no row; objects are newer.
    if transformers is not None and case not in ("as padding alone", "in an object"):
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
        assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT)


def test_declared_tokens_that_fit_nothing_are_refused(declared: Any) -> None:
    for files, message in (
        ({CONFIG: {"added_tokens_decoder": {"900": entry(A)}}}, r"'<\|a\|>' the id 900, but .* it would be 600"),
        ({CONFIG: {"added_tokens_decoder": [1]}}, "added_tokens_decoder, .* cannot be read"),
        ({CONFIG: {}, ADDED: {A: "x"}}, "added_tokens.json cannot be read"),
        ({CONFIG: {}, ADDED: {A: float("inf")}}, "added_tokens.json cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(declared(files))


PLAIN, LLAMA = {}, {"tokenizer_class": "LlamaTokenizer"}
# The settings beside a model with a dummy prefix, a text, and its pieces.
SPACES: list[tuple[dict[str, Any], str, list[str]]] = [
    (PLAIN, "a</s>b<|e|>c", ["▁a", "</s>", "▁b", "<|e|>", "c"]),
    (LLAMA, "a</s>b<|e|>c", ["▁a", "</s>", "▁b", "<|e|>", "▁c"]),
    (LLAMA | {"legacy": True}, " a</s> b", ["▁", "▁a", "</s>", "▁", "▁b"]),
    (LLAMA | {"legacy": False}, "a</s>b<|e|>c", ["▁a", "</s>", "b", "<|e|>", "c"]),
    (LLAMA | {"legacy": False}, " a</s> b", ["▁a", "</s>", "▁b"]),
    (LLAMA | {"legacy": False}, "</s>b", ["</s>", "b"]),
    (LLAMA | {"legacy": False}, "", []),
    (LLAMA | {"legacy": False, "add_prefix_space": False}, "a</s>b", ["a", "</s>", "b"]),
    (LLAMA | {"add_prefix_space": False}, "a</s> b", ["a", "</s>", "▁b"]),
    (LLAMA | {"legacy": False, "additional_special_tokens": ["b"]}, "ab", ["▁a", "b"]),
]


@pytest.fixture(scope="module")
def model() -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c ab"] * 20), model_writer=written, model_type="bpe", vocab_size=300, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True, unk_id=0, bos_id=1, eos_id=2,
        pad_id=-1, minloglevel=2, user_defined_symbols=["<|e|>"],
    )  # fmt: skip
    return written.getvalue()


@pytest.mark.parametrize("settings, text, pieces", SPACES)
def test_spaces_at_special_tokens(
    model: bytes, tmp_path: Path, settings: dict[str, Any], text: str, pieces: list[str]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path)
    assert pieces_of(tokenizer, text) == pieces
    if transformers is not None and settings != PLAIN:
        theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
        assert theirs.convert_ids_to_tokens(theirs(text, add_special_tokens=False)["input_ids"]) == pieces


def test_a_token_that_a_sentencepiece_model_lacks_is_refused(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / ADDED).write_text(json.dumps({A: 300, "</s>": 2}))
    with pytest.raises(
        UserError, match=r"add '<\|a\|>', which a SentencePiece model cannot take; make a tokenizer.json"
    ):
        load_tokenizer(tmp_path)

"""Tokenizers lose nothing, find their special tokens, and are cut as their checkpoint's settings and transformers say."""

import importlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxblock.data.config import DataConfig
from jaxblock.data.tokens.find_special import find_special
from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.data.tokens.sentencepiece_model import train_tokenizer
from jaxblock.data.tokens.special import SpecialIds
from jaxblock.data.tokens.templates import template_source
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.data.tokens.tokenizer_json import HuggingFaceTokenizer
from jaxblock.errors import UserError

# Where it is installed (benchmarks/requirements.txt), what is expected below is compared with what it does.
transformers = importlib.import_module("transformers") if importlib.util.find_spec("transformers") else None


def special_of(tokenizer: Tokenizer, **config: str) -> SpecialIds:
    return find_special(tokenizer, "chat", template_source("chat"), DataConfig(**config), {})[1]


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.piece(i) for i in tokenizer.encode(text)]


HARD_TEXTS = [
    "  two blanks first, one last ",
    "tab\t, line\r\nfeed\n\n, zero \0",
    "Où? “5 + 7” é e\u0301 😀 中文 \u0650",
    "SentencePiece's own space \u2581 and \u2581\u2581, a \u2585, \u2047, <unk>, <s>, <0x41>",
    *("", " "),
]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "char"])
def test_every_model_type_round_trips(kind):
    texts = [f"Ada has {n} coins.\n{n} + 1 = {n + 1}" for n in range(60)]
    tokenizer = train_tokenizer(texts, DataConfig(tokenizer_type=kind, vocab_size=500))
    for text in texts + HARD_TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special=False) == text and tokenizer.id_of("<unk>") not in ids
    assert 256 < tokenizer.vocab_size <= 500 and "\n" in pieces_of(tokenizer, "1\n2")


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_round_trips(pieces, text):
    assert pieces.decode(pieces.encode(text), skip_special=False) == text


def test_special_tokens_are_single_and_can_be_skipped(pieces):
    ids = pieces.encode("a<|eot_id|><|mdm_mask|> b")
    assert pieces.decode(ids) == "a b"
    assert [pieces.piece(i) for i in ids if i < 10] == ["<|eot_id|>", "<|mdm_mask|>"]
    mask, eos, eot = (pieces.id_of(text) for text in ("<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>"))
    found = special_of(pieces)
    assert (found.mask, found.eos, found.eot, found.pad, found.stop_ids) == (mask, eos, eot, eos, (eot, eos))
    assert special_of(pieces, eos_token="<|eot_id|>").stop_ids == (eot,)
    with pytest.raises(UserError, match="data.mask_token: '<|eot_id|>' is also"):
        special_of(pieces, mask_token="<|eot_id|>")


@pytest.mark.parametrize("name, text", [("mask", "<|mdm_mask|>"), ("eos", "<|endoftext|>"), ("eot", "<|eot_id|>")])
def test_a_missing_special_token_names_its_field(tokenizer_folder, name, text):
    with pytest.raises(UserError, match=rf"data\.{name}_token: .* no token ") as caught:
        special_of(load_tokenizer(tokenizer_folder(without=text)), **{f"{name}_token": text})
    assert ("mask_token_id" in str(caught.value)) == (name == "mask")


def test_digits_can_stand_alone():
    for split, expected in [(False, ["12"]), (True, ["1", "2"])]:
        tokenizer = train_tokenizer(["12 + 34 = 46"] * 20, DataConfig(vocab_size=400, split_digits=split))
        assert pieces_of(tokenizer, "12") == expected


def test_training_says_what_to_set():
    for config, texts, complaint in [
        ({"vocab_size": 200}, ["a"], "data.vocab_size = 200 is too small: bytes and special tokens alone need 263"),
        ({"vocab_size": 270}, ["abcdefghijklmnopqrstuvwxyz"] * 9, r"set at least 28\d"),
        ({"vocab_size": 300}, ["", "\n"], "the training text is empty"),
        ({"mask_token": "MASK"}, ["a"], "'MASK' of a trained tokenizer must be in brackets"),
    ]:
        with pytest.raises(UserError, match=complaint):
            train_tokenizer(texts, DataConfig(**config))


def test_saved_tokenizers_load_the_same(tokenizer_folder, pieces, tmp_path):
    text = "Ada has 5 coins.\n<|eot_id|>é"
    for file, tokenizer in [("tokenizer.model", pieces), ("tokenizer.json", load_tokenizer(tokenizer_folder()))]:
        tokenizer.save(tmp_path / file)
        for path in (tmp_path / file, tmp_path / file / file):
            again = load_tokenizer(path)
            assert again.encode(text) == tokenizer.encode(text)
            assert again.decode(again.encode(text), skip_special=False) == text
            assert again.decode(again.encode(text)) == "Ada has 5 coins.\né"
            assert again.vocab_size == tokenizer.vocab_size > max(again.encode(text))
            assert (again.special_texts, again.settings) == (tokenizer.special_texts, tokenizer.settings)


def test_what_is_no_tokenizer_is_named(tmp_path):
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
    drops = b'{"model": {"type": "BPE", "dropout": 0.5, "vocab": {"a": 0}, "merges": []}}'
    with pytest.raises(UserError, match="test: model.dropout in tokenizer.json cuts a text in another way each time"):
        HuggingFaceTokenizer({"tokenizer.json": drops}, "test")
    for damaged in (b"{", b"[" * 100_000, b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}'):
        with pytest.raises(UserError, match="test: not a Hugging Face tokenizer.json"):
            HuggingFaceTokenizer({"tokenizer.json": damaged}, "test")


def test_a_tokenizer_that_has_no_token_for_a_letter_says_so():
    for model, message in [
        (tokenizers.models.BPE({"a": 0, "b": 1}, []), r"no token for '\?' at character 1 and none for unknown letters"),
        (tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"), r"cannot encode the text .*Missing \[UNK\] token"),
        (tokenizers.models.Unigram([("a", -1.0)], None), r"cannot encode the text .*unk_id"),
    ]:
        text = tokenizers.Tokenizer(model).to_str()
        with pytest.raises(UserError, match=message):
            HuggingFaceTokenizer({"tokenizer.json": text.encode()}, "test").encode("a?")


def entry(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


A, B, END = "<|a|>", "<|b|>", "<|eot_id|>"
TEXT = f"1{A} {B} 2{END} 3"
BOTH = ["1", A, "Ġ", B, "Ġ2", END, "Ġ3"]
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
LISTED = {"additional_special_tokens": [B]}
FLAGS = {"5": entry(END, rstrip=True), "600": entry(A), "601": entry(B, lstrip=True, special=False)}
# The files beside a tokenizer.json of 600 tokens, and the pieces of TEXT.
DECLARED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "with ids": ({CONFIG: {"added_tokens_decoder": {"601": entry(B), "600": entry(A)}}}, BOTH),
    "with flags": ({CONFIG: {"added_tokens_decoder": FLAGS}}, ["1", A, B, "Ġ2", END, "3"]),
    "in a list": ({CONFIG: {"additional_special_tokens": [A, {"__type": "AddedToken", **entry(B)}]}}, BOTH),
    "in an object": ({CONFIG: {"extra_special_tokens": {"a_token": A, "b_token": B}}}, BOTH),
    "in the older file": ({CONFIG: {"additional_special_tokens": [A]}, ADDED: {B: 601, A: 600}}, BOTH),
    "in the older map": ({CONFIG: {"bos_token": A}, MAP: LISTED}, BOTH),
    "as padding alone": ({CONFIG: {"pad_token": A, "added_tokens_decoder": {}}, MAP: LISTED}, []),
}


@pytest.fixture
def declared(tokenizer_folder):
    def make(files: dict[str, Any]) -> Path:
        folder = Path(tokenizer_folder())
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        return folder

    return make


@pytest.mark.parametrize("case", DECLARED)
def test_declared_tokens_are_added(declared, case):
    files, pieces = DECLARED[case]
    folder = declared(files)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == (602 if pieces else 600)
    if pieces:
        assert pieces_of(tokenizer, TEXT) == pieces and (tokenizer.id_of(A) == 600 or case == "in the older map")
        ordinary = {B} if case in ("with flags", "in the older file") else set()
        assert tokenizer.special_texts & {A, B, END} == {A, B, END} - ordinary
    masked = tokenizer.with_special_token("<|m|>", "mask_token")
    assert masked.encode(TEXT) == tokenizer.encode(TEXT) and masked.id_of("<|m|>") == tokenizer.vocab_size
    # There, padding would get an id for which an embedding has no row; objects are newer.
    if transformers is not None and case not in ("as padding alone", "in an object"):
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
        assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT)


def test_declared_tokens_that_fit_nothing_are_refused(declared):
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


@pytest.fixture
def spaced(tmp_path):
    """Returns a folder with a SentencePiece model that begins words with a space."""
    written = io.BytesIO()
    options = {"vocab_size": 300, "hard_vocab_limit": False, "byte_fallback": True, "user_defined_symbols": ["<|e|>"]}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    options |= {"model_type": "bpe", "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    texts = iter(["a b c ab"] * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=written, **options)
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    return tmp_path


def test_spaces_at_special_tokens(spaced):
    (spaced / "config.json").write_text('{"model_type": "llama"}')
    for changes, text, pieces in SPACES:
        (spaced / CONFIG).write_text(json.dumps(changes))
        assert pieces_of(load_tokenizer(spaced), text) == pieces, (changes, text)
        if transformers is not None and changes != PLAIN:
            theirs = transformers.AutoTokenizer.from_pretrained(str(spaced))
            assert theirs.convert_ids_to_tokens(theirs(text, add_special_tokens=False)["input_ids"]) == pieces


def test_a_token_that_a_sentencepiece_model_lacks_is_refused(spaced):
    (spaced / ADDED).write_text(json.dumps({A: 300, "</s>": 2}))
    with pytest.raises(UserError, match=r"add '<\|a\|>', which a SentencePiece model cannot take; make a tokenizer.js"):
        load_tokenizer(spaced)

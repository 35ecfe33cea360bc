"""Tests that no text of a user becomes a control token, whatever the tokenizer's normalisation and the template do to it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
import sentencepiece
import tokenizers

from jaxblock.data.config import DataConfig
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.sentencepiece_model import SentencePieceTokenizer
from jaxblock.data.tokens.special import SpecialIds
from jaxblock.data.tokens.templates import NAMED, Template
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.data.tokens.tokenizer_json import HuggingFaceTokenizer
from jaxblock.errors import UserError

SPECIAL = ("<|mask|>", "<|eos|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
EDITING = NAMED["chat"].replace("message['content'] | trim", "message['content'] | replace('*', '')")
HARMLESS = "Is 2*3 < 7 or >, ﬁne | so? ４２ <eot_id|> Ünïcode 你好"


def sentencepiece_with(normalisation: str) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["user assistant system said some words and numbers 0123456789 <|>_"] * 20),
        model_writer=model,
        model_type="char",
        vocab_size=400,
        hard_vocab_limit=False,
        user_defined_symbols=[*SPECIAL, "\n"],
        normalization_rule_name=normalisation,
        add_dummy_prefix=False,
        byte_fallback=True,
        minloglevel=2,
    )
    return SentencePieceTokenizer({"tokenizer.model": model.getvalue()}, "test")


def tokenizer_json_with(normaliser: tokenizers.normalizers.Normalizer) -> Tokenizer:
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    built = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    built.normalizer, built.pre_tokenizer = normaliser, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens([tokenizers.AddedToken(text, normalized=True) for text in SPECIAL])
    content = {"tokenizer.json": built.to_str().encode(), "tokenizer_config.json": json.dumps({}).encode()}
    return HuggingFaceTokenizer(content, "test")


def encoder(tokenizer: Tokenizer, source: str = NAMED["chat"], system: str | None = None) -> Encoder:
    ids = [tokenizer.id_of(text) for text in SPECIAL[:3]]
    special = SpecialIds(*[i for i in ids if i is not None], pad=ids[1] or 0)
    template = Template("mine", source, {"bos_token": "", "eos_token": SPECIAL[1], "eot_token": SPECIAL[2]})
    return Encoder(tokenizer, template, special, DataConfig(system=system))


NORMALISERS = tokenizers.normalizers
CASES: dict[str, tuple[Callable[[], Tokenizer], str, str]] = {
    "full-width brackets, SentencePiece": (lambda: sentencepiece_with("nmt_nfkc"), NAMED["chat"], "x＜|eot_id|＞ y"),
    "control letter, SentencePiece": (lambda: sentencepiece_with("nmt_nfkc"), NAMED["chat"], "<|start_header\x07_id|>"),
    "full-width letters": (lambda: tokenizer_json_with(NORMALISERS.NFKC()), NAMED["chat"], "<|ｅot_id|>"),
    "capitals": (lambda: tokenizer_json_with(NORMALISERS.Lowercase()), NAMED["chat"], "<|EOT_id|>"),
    "invisible letter": (lambda: tokenizer_json_with(NORMALISERS.Replace("\u200b", "")), NAMED["chat"], "<|m\u200bask|>"),
    "accents": (lambda: tokenizer_json_with(NORMALISERS.BertNormalizer(lowercase=True)), NAMED["chat"], "<|éos|>"),
    "a template that edits texts": (lambda: tokenizer_json_with(NORMALISERS.NFC()), EDITING, "<|eot*_id|>"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_text_that_becomes_a_control_token_is_refused_with_its_place(case: str) -> None:
    make, source, text = CASES[case]
    encodes = encoder(make(), source)
    for turns in (
        [("user", f"a {text} b")],
        [("user", "a"), ("assistant", f"b {text}"), ("user", "c")],
        [("system", text), ("user", "a")],
    ):
        with pytest.raises(
            UserError, match=r"^in\.jsonl:7: the \w+'s text ch\w+ the control tokens: .*control token \d"
        ):
            encodes.prompt([{"role": role, "content": content} for role, content in turns], where="in.jsonl:7")
    with pytest.raises(UserError, match=r"the system's text changes the control tokens"):
        encoder(encodes.tokenizer, source, system=text).prompt("a", where="in.jsonl:7")
    assert encodes.prompt(HARMLESS) != encodes.prompt("other")


@pytest.mark.parametrize(
    ("source", "prompt", "message"),
    [
        ("{{ '<|start_header_id|>' }}", "a", "leaves out the user's text"),
        ("{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}", "a", "leaves out the user's text"),
        (NAMED["chat"], " \n", "the text is empty"),
        (NAMED["chat"], "\ud800", "half of a surrogate pair"),
    ],
)
def test_a_prompt_that_would_show_the_model_nothing_is_refused(source: str, prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder(tokenizer_json_with(NORMALISERS.NFC()), source).prompt(prompt)


MODELS = tokenizers.models


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODELS.BPE({"a": 0, "b": 1}, []), r"no token for '\?' at character 1 and none for unknown letters"),
        (MODELS.WordLevel({"a": 0}, unk_token="[UNK]"), r"cannot encode the text .*Missing \[UNK\] token"),
        (MODELS.Unigram([("a", -1.0)], None), r"cannot encode the text .*unk_id"),
    ],
)
def test_a_tokenizer_that_has_no_token_for_a_letter_says_so(model: tokenizers.models.Model, message: str) -> None:
    text = tokenizers.Tokenizer(model).to_str()
    with pytest.raises(UserError, match=message):
        HuggingFaceTokenizer({"tokenizer.json": text.encode()}, "test").encode("a?")
    for damaged in (b"{", b"[" * 100_000, b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}'):
        with pytest.raises(UserError, match="test: not a Hugging Face tokenizer.json"):
            HuggingFaceTokenizer({"tokenizer.json": damaged}, "test")

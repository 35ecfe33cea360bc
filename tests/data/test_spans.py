"""Texts with spans to fill: their markers, their ids with masks in them, and the text that filled spans have become."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from jaxblock.data.config import DataConfig
from jaxblock.data.text.marked import MarkedText, parts_of, read_marked, with_markers
from jaxblock.data.text.recipes import with_recipe
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.find_special import find_special
from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.data.tokens.spans import encode_spans, filled_text, fills_of, plain_encoder
from jaxblock.data.tokens.templates import NAMED
from jaxblock.errors import UserError


def test_markers_and_pieces():
    assert parts_of("a [[8]] b[[2]][[1]]", "x") == ["a ", 8, " b", 2, 1]
    assert parts_of(["x = [[8]] # ", 3, ""], "x") == ["x = [[8]] # ", 3], "in a list, texts are taken as they are"
    assert parts_of("[[a]] [[-1]] [[ 2 ]] [[3]]", "x") == ["[[a]] [[-1]] [[ 2 ]] ", 3], "what is no number is text"
    assert with_markers(["a ", 8, "b"]) == "a [[8]]b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marker [8]", "has no span to fill: write [[8]]"),
        (["only text"], "has no span to fill"),
        ("a [[0]]", "a span of 0 tokens"),
        (["a", -2], "a span of -2 tokens"),
        ("[[" + "9" * 5000 + "]]", "more tokens than any model takes"),
        (["a", True, 3], "holds True"),
        (["a", 2.0, 3], "holds 2.0"),
        ({"a": 3}, "must be a text with spans"),
        (None, "must be a text with spans"),
    ],
)
def test_what_is_no_text_with_spans_is_refused(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parts_of(text, "x.jsonl:3")


def test_records(tmp_path):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A [[2]]"}]
    records = [{"question": "Q", "answer": "A [[2]]"}, {"answer": ["A ", 2], "id": 7}, {"messages": turns}]
    for bad, message in [
        ({"text": "[[2]]"}, "no field 'answer' with the text to fill; set data.response_field to one of 'text'"),
        ({"answer": "[[2]]", "questoin": "Q"}, "no field 'question' (did you mean 'questoin'?)"),
        ({"messages": turns[:1]}, "must end with a turn of the user and one of the assistant"),
        ({"answer": "none", "question": "Q"}, "has no span"),
        ({"answer": "[[1]]", "question": 3}, "field 'question' must be a string"),
    ]:
        path = tmp_path / "texts.jsonl"
        path.write_text("\n".join(json.dumps(record) for record in [*records, bad]))
        found = read_marked(str(path), with_recipe(DataConfig()))
        assert [next(found)[1] for _ in records] == [
            MarkedText(["A ", 2], "Q"),
            MarkedText(["A ", 2], None),
            MarkedText(["A ", 2], turns[:1]),
        ]
        with pytest.raises(UserError, match=re.escape(f"{path}:4") + ".*" + re.escape(message)):
            next(found)


def _encoders(tokenizer, **config):
    settings = DataConfig(**config)
    template, special = find_special(tokenizer, "chat", NAMED["chat"], settings, {})
    return Encoder(tokenizer, template, special, settings), plain_encoder(tokenizer, special)


@pytest.fixture(params=["sentencepiece", "tokenizer.json", "no mask in it"])
def encoders(request, pieces, tokenizer_folder):
    """(the encoder with a chat template, the plain one) of either kind of tokenizer; the last has no text for its mask."""
    if request.param == "sentencepiece":
        return _encoders(pieces)
    tokenizer = load_tokenizer(tokenizer_folder())
    chat, plain = _encoders(tokenizer)
    if request.param == "tokenizer.json":
        return chat, plain
    special = dataclasses.replace(chat.special, mask=tokenizer.vocab_size)
    return Encoder(tokenizer, chat.template, special, chat.config), plain_encoder(tokenizer, special)


def _shown(encoder, ids, mask):
    """The text of ids with a # for each mask."""
    return "".join("#" if i == mask else encoder.tokenizer.decode([i], skip_special=False) for i in ids)


@pytest.mark.parametrize("parts", [["5 + ", 2, " = 12,\n ok", 1], [3, "a"], ["Zoe keeps 9", 1, 2, " keys"]])
def test_the_ids_around_spans_are_those_of_the_text(encoders, parts):
    chat, plain = encoders
    mask, template = chat.special.mask, "".join(p if isinstance(p, str) else "#" * p for p in parts)
    alone = encode_spans(chat, plain, MarkedText(parts, None), "x")
    assert _shown(plain, alone.ids, mask) == template
    answer = encode_spans(chat, plain, MarkedText(parts, "How many?"), "x")
    prompt = chat.prompt("How many?")
    assert answer.ids[: len(prompt)] == prompt
    end = "" if isinstance(parts[-1], int) else "<|eot_id|>"
    assert _shown(chat, answer.ids[len(prompt) :], mask) == template + end, "after a last span the end is open"
    for found in (alone, answer):
        lengths = [part for part in parts if isinstance(part, int)]
        assert [end - first for first, end in found.spans] == lengths
        masked = [at for first, end in found.spans for at in range(first, end)]
        assert masked == [at for at, i in enumerate(found.ids) if i == mask] and found.first == masked[0]
    # Spans filled with a text of as many tokens come out as that text, special tokens left out.
    word = chat.tokenizer.encode(" keys")
    ids = list(answer.ids)
    for first, end in answer.spans:
        ids[first:end] = (word + [chat.special.eos] * (end - first))[: end - first]
    fills = fills_of(chat.tokenizer, ids, answer.spans)
    assert all(" keys".startswith(fill) and fill for fill in fills)
    assert filled_text(parts, fills) == chat.tokenizer.decode(ids[len(prompt) :])


def test_a_conversation_a_system_message_and_a_prompt_template_are_laid_out_as_for_decode(pieces):
    chat, plain = _encoders(pieces, system="Be brief.", prompt_template="Q: {prompt}")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for prompt in ("How many?", turns):
        found = encode_spans(chat, plain, MarkedText(["x", 1, "y"], prompt), "x")
        expected = chat.prompt(prompt)
        assert found.ids[: len(expected)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MarkedText(["a <|eot_id|>", 2], None), "special token '<|eot_id|>'"),
        (MarkedText(["a <|mdm_mask|>", 2], "How many?"), "special token '<|mdm_mask|>'"),
        (MarkedText(["a", 2], "<|eot_id|>"), "special token"),
        (MarkedText(["\ud800", 2], None), "half of a surrogate pair"),
        (MarkedText(["a", 2], ""), "is empty"),
    ],
)
def test_special_tokens_in_texts_with_spans_are_refused(pieces, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        encode_spans(*_encoders(pieces), text, "x")


def test_plain_texts_begin_as_the_tokenizer_says(tokenizer_folder):
    folder = tokenizer_folder()
    for begins in (False, True):
        settings = Path(folder, "tokenizer_config.json")
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": begins}))
        chat, plain = _encoders(load_tokenizer(folder))
        found = encode_spans(chat, plain, MarkedText(["a", 1], None), "x")
        assert _shown(plain, found.ids, chat.special.mask) == "<|startoftext|>" * begins + "a#"
    turns = [
        {"role": "user", "content": "a\n"},
        {"role": "assistant", "content": " b"},
        {"role": "user", "content": "c"},
    ]
    assert plain.tokenizer.decode(plain.prompt(turns)) == "a\n\n b\nc"

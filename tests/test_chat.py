"""Tests `jaxblock chat`, over a pipe and as its class: turns, commands, settings, and what does not fit or cannot be shown."""

import dataclasses
import io
import json
import re
import sys

import numpy as np
import pytest

from jaxblock.chat import Chat
from jaxblock.errors import UserError


@pytest.fixture
def piped(monkeypatch, ran, tiny_run):
    """A function: standard input -> (standard output, standard error) of a session that ends well."""

    def talk(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        told = ran(f"chat --checkpoint {tiny_run}")
        return told.out, told.err

    return talk


def test_a_session_over_a_pipe(piped, ran, tiny_run):
    """The first answer is that of `decode`; so is the one after a reset, with the setting changed meanwhile."""
    expected = [
        json.loads(ran(f"decode --checkpoint {tiny_run} 1+2? {flags}").out)["response"]
        for flags in ("", "--decode.steps_per_block 1")
    ]
    changed = "/set decode.steps_per_block 1\n1+2?\r\n/set decode.block 5\n/quit\n3+4?"
    out, err = piped(f"\ufeff1+2?\n\n/reset\n{changed}".encode())
    assert out == "".join(f"{answer}\n" for answer in expected)
    assert "the conversation begins anew" in err and "set block to 4 or response_len to 20" in err
    assert piped(b"") == ("", "") == piped(b"  ")
    out, err = piped(b"caf\xe9\n1+2?\n")
    assert out == f"{expected[0]}\n" and "standard input:1: not UTF-8 text" in err


SAYS = """
/rest | unknown command /rest; did you mean /reset?
/set decode.threshold | 'decode.threshold' stands alone
/set decode.treshold 0.9 | unknown key treshold; did you mean threshold?
/set decode.temperature hot | temperature must be float, not 'hot'
/set --decode.threshold 0.8 | decode.threshold 0.8 has no effect under decode.rule low_confidence
/set train.steps 3 | 'train.steps' cannot be set here
/set decode.seed 1 decode.seed 2 | /set gives a name twice
/set decode.seed '1 | No closing quotation
/set | decode.rule low_confidence
/help | Ctrl-C stops an answer
/reset now | takes nothing after it
/system be brief be brief be brief be brief be brief be brief | more than there is room for (canvas.prompt_len 24
/system <|eot_id|> | contains the special token
say <|eot_id|> | the user's text contains the special token
1+2? 1+2? 1+2? 1+2? 1+2? 1+2? 1+2? | more than there is room for (canvas.prompt_len 24
"""
"""A line, and what is said of it; no answer is given, and the session goes on."""


def test_commands_and_what_is_refused_do_not_end_the_session(piped):
    lines, says = zip(*(line.split(" | ") for line in SAYS.strip().splitlines()), strict=True)
    out, err = piped("\n".join(lines).encode())
    assert out == "" and "Traceback" not in err
    for said in says:
        assert said in err
        err = err.split(said, 1)[1]  # they are said in this order


def _chat(model, **settings):
    told = []
    return Chat(dataclasses.replace(model, **settings), told.append), told


def test_turns_are_shown_again_until_there_is_no_room(model, monkeypatch):
    chat, told = _chat(model)
    asked = []
    stream = type(model).stream
    monkeypatch.setattr(type(model), "stream", lambda self, ids, **k: asked.append((ids, k)) or stream(self, ids, **k))
    first = "".join(chat.answer("1+2?"))
    assert first == model.generate("1+2?") and len(chat.turns) == 2
    wide = dataclasses.replace(model.canvas, prompt_len=200)
    chat.model = dataclasses.replace(chat.model, canvas=wide)
    "".join(chat.answer("3+4?"))
    turns = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": first}]
    assert asked[1] == (model.encoder.prompt([*turns, {"role": "user", "content": "3+4?"}]), {"index": 1})
    assert not told and len(chat.turns) == 4
    chat.model = model  # with room for a question alone
    "".join(chat.answer("5+6?"))
    assert asked[2][0] == model.encoder.prompt("5+6?") and len(chat.turns) == 2
    assert re.search(r"takes \d+ tokens.*canvas.prompt_len 24.*oldest 2 messages and their answers", told[0])
    chat.set_system("x")
    assert chat.system == "x" and len(chat._ids(chat.turns[:1])) > len(asked[2][0])
    chat.reset()
    assert chat.turns == [] and chat.system == "x"


def test_an_answer_streams_by_block_and_keeps_what_there_is_when_it_is_stopped(model, monkeypatch, piped):
    def scripted(*canvases):
        """Replaces ``Model.stream``, which yields the ids of canvases and is interrupted where one is None."""

        def stream(model, ids, *, index):
            for canvas in canvases:
                if canvas is None:
                    raise KeyboardInterrupt
                yield np.array([*canvas, *[model.arch.mask_id] * (16 - len(canvas))]), 1

        monkeypatch.setattr(type(model), "stream", stream)

    encode = model.tokenizer.encode
    text, snow = encode("1+2="), encode("☃")  # of three bytes
    assert len(snow) == 3
    chat, told = _chat(model)
    scripted(text, [*text, *snow[:2]], [*text, *snow, 3, 2])
    assert list(chat.answer("1+2?")) == ["1+2=", "☃"] and chat.turns[1]["content"] == "1+2=☃"
    scripted([*text, *snow[:1], 3])
    assert list(chat.answer("1+2?"))[-1] == "\ufffd", "bytes that make no letter are shown at the end"
    scripted([3])
    chat.reset()
    assert list(chat.answer("1+2?")) == [] and chat.turns == [] and "the answer is empty" in told[-1]
    scripted(text, None)
    with pytest.raises(KeyboardInterrupt):
        list(chat.answer("1+2?"))
    assert chat.turns[1]["content"] == "1+2="
    out, err = piped(b"1+2?\n1+2?")
    assert out == "1+2=\n" * 2 and err.count("stopped") == 2


def test_without_a_chat_template_the_texts_are_given_as_they_are(model):
    chat, told = _chat(model, encoder=None, recorded=False)
    assert "has no chat template" in told[0] and len(told) == 1
    roles = (("user", "a"), ("assistant", "b"), ("user", "c"))
    ids = chat._ids([{"role": role, "content": content} for role, content in roles])
    assert ids == model.tokenizer.encode("a\nb\nc")
    with pytest.raises(UserError, match="special token"):
        next(chat.answer("<|eot_id|>"))
    with pytest.raises(UserError, match="4080 of the model's 4096 positions, beside the response"):
        next(chat.answer("1" * 4090))
    with pytest.raises(UserError, match="no tokenizer"):
        _chat(model, encoder=None, tokenizer=None)

"""Tests infilling as users have it: `Model.infill` and `decode --infill`."""

import dataclasses
import io
import json
import re
import sys

import numpy as np
import pytest

from jaxblock.commands.prompts import read_texts
from jaxblock.data.config import DataConfig
from jaxblock.data.text.marked import MarkedText, with_markers
from jaxblock.diffusion.decoding import decoder
from jaxblock.errors import UserError

ANSWER = "1+2=[[1]]\n#### [[2]]."


def test_a_text_is_filled_between_what_is_given(model):
    """Alone, as the answer to a prompt, as pieces, in a list; with every step, which `stream_infill` shows as well."""
    options = {"temperature": 0.7, "seed": 3, "steps_per_block": 2}
    texts, prompts = [ANSWER, ["[[1]] ", 5, "="], "1[[3]]"], ["1+2?", None, None]
    whole = model.infill(texts, prompts, return_steps=True, **options)
    mask = model.arch.mask_id
    for found, text in zip(whole, (ANSWER, "[[1]] [[5]]=", "1[[3]]"), strict=True):
        given = re.split(r"\[\[[0-9]\]\]", text) if found is not whole[1] else ["[[1]] ", "="]
        assert found.text == "".join(part + fill for part, fill in zip(given, [*found.fills, ""], strict=True))
        assert found.canvases.shape == (found.nfe + 1, len(found.ids)) and mask not in found.ids
        assert found.canvases[-1].tolist() == found.ids
        holes = [at for first, end in found.spans for at in range(first, end)]
        assert np.flatnonzero(found.canvases[0] == mask).tolist() == holes
    prompt = model.encoder.prompt("1+2?")
    assert whole[0].ids[: len(prompt)] == prompt and whole[0].ids[-2:] == [*model.tokenizer.encode("."), 3]
    assert [found.nfe for found in whole] == [3, 3, 2]  # blocks of 1 and 2, of 4 and 1, of 3 positions
    text = model.spanned_text(MarkedText(["1+2=", 1, "\n#### ", 2, "."], "1+2?"), "x")
    states = list(model.stream_infill(text, **options))
    for step, (state, nfe) in enumerate(states, 1):
        assert nfe == step and [*whole[0].ids[: text.first], *state] == whole[0].canvases[step].tolist()
    trace = model.trace_infill(text, candidates=2, **options)
    assert trace.response.tolist() == whole[0].ids[text.first :] and (trace.nfe, trace.positions) == whole[0][4:6]
    given = [at for at, i in enumerate(text.ids[text.first :]) if i != mask]
    assert np.flatnonzero(trace.commit_step == decoder.GIVEN).tolist() == given and trace.commit_step.max() == 2
    assert trace.beliefs.ids.shape == (len(trace.response), 2) and not trace.beliefs.probability[given].any()
    alone = model.infill(ANSWER, "1+2?", **options)
    assert alone._replace(canvases=None) == whole[0]._replace(canvases=None) and alone.canvases is None
    assert model.infill([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no span",), "the text has no span to fill"),
        ((["a", "b [[0]]"],), "text 0 has no span"),
        ((["1+2=", 10**20],), "the text has spans of 100000000000000000000 tokens in all, more than any model takes"),
        (("[[9999999]]1" * 2,), "the text has spans of 19999998 tokens in all, more than any model takes"),
        ((["1", -(10**5000)],), "the text has a span of a number of 16,610 bits tokens: a span has at least 1"),
        (("1[[3000]]2[[2000]]",), "the text has spans of 5000 tokens, more than the model's 4096"),
        (("[[4]]",), "gives nothing but spans"),
        (("1[[9]]" + "2" * 9,), "text 0 has 18 tokens from its first span to its end, more than the canvas's 16 response"),
        (("1" * 39 + "[[2]]",), "text 0 has 41 tokens, its prompt included; the network was trained on canvas.prompt_len 24"),
        (("1[[2]]", "1+2? " * 9), "the text: the prompt has"),
        (("1[[2]]", "a <|eot_id|>"), "contains the special token"),
        (("1[[2]]", [{"role": "assistant", "content": "1"}]), "the last message must be the user's"),
        ((["1[[2]]", "2[[2]]"], ["a"]), "2 texts need as many prompts"),
        ((["1[[2]]"], "a"), "1 texts need as many prompts"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_filled(model, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        model.infill(*arguments)


def test_models_that_cannot_fill_every_text(model):
    bare = dataclasses.replace(model, encoder=None)
    assert bare.infill("1+2=[[1]]").ids == model.infill("1+2=[[1]]").ids, "a text that stands alone needs no template"
    windowed = dataclasses.replace(model, canvas=dataclasses.replace(model.canvas, suffix_window=4))
    shifted = dataclasses.replace(model.net, arch=dataclasses.replace(model.arch, alignment="shifted"))
    for changed, arguments, options, message in [
        (bare, (ANSWER, "1+2?"), {}, "no chat template for the prompt: leave it out"),
        (dataclasses.replace(bare, tokenizer=None), ("1+2=[[1]]",), {}, "has no tokenizer"),
        (windowed, ("1+2=[[1]]",), {}, "set canvas.suffix_window to null"),
        (dataclasses.replace(model, net=shifted), ("[[1]]+2",), {}, "begins with a span, and this network predicts"),
        (model, ("1[[2]]",), {"temprature": 1.0}, "did you mean temperature?"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            changed.infill(*arguments, **options)


def test_decode_fills_texts_from_everywhere(tiny_run, tmp_path, monkeypatch, ran):
    command = f"decode --infill --checkpoint {tiny_run} "
    texts = ["1+2=[[1]]", "[[2]]=3"]
    expected = [json.loads(line) for line in ran(command + "'1+2=[[1]]' '[[2]]=3'").out.splitlines()]
    assert [set(line) for line in expected] == [{"prompt", "text", "fills", "tokens", "nfe"}] * 2
    for line, given in zip(expected, texts, strict=True):
        assert line["text"] == re.sub(r"\[\[[0-9]\]\]", lambda _, line=line: line["fills"][0], given)
        assert line["prompt"] is None and line["tokens"] == int(re.search("[0-9](?=]])", given)[0])
    (tmp_path / "t.txt").write_text("\n".join(texts))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"answer": text}) + "\n" for text in texts))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n\n".join(texts).encode())))
    for file in ("t.txt", "t.jsonl", None):
        read = read_texts((), file and str(tmp_path / file), DataConfig())
        assert [with_markers(text.parts) for _, text in read] == texts
    (tmp_path / "huge.jsonl").write_text("".join(json.dumps({"answer": ["1", n]}) + "\n" for n in (2, 7 * 10**8)))
    said = ran(f"{command}--file {tmp_path}/huge.jsonl", 2).err
    assert "huge.jsonl:2" in said and "has spans of 700000000 tokens in all, more than any model takes" in said
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "1+2?", "answer": ANSWER}))
    out = tmp_path / "out.jsonl"
    ran(f"{command}--file {tmp_path}/q.jsonl --out {out}")
    line = json.loads(out.read_text())
    assert line["prompt"] == "1+2?" and line["text"].startswith("1+2=")
    shown = ran(f"{command}--file {tmp_path}/q.jsonl --watch").out
    assert "prompt: 1+2?\n1+2=" in shown and "given  " in shown and "block 1/" in shown and "NFE 3  3/3 tokens" in shown
    (tmp_path / "t.txt").write_text("\n")
    page = ran(f"{command}'1+2=[[1]]' --html {tmp_path}/t.html")
    assert json.loads(page.out) == expected[0] and '"boxes":[[0,1,0]]' in (tmp_path / "t.html").read_text()
    assert "no texts: give some" in ran(f"{command}--file {tmp_path}/t.txt", 2).err
    for mistake, says in (("1+2", "text 1 has no span"), ("'1[[40]]'", "text 1 has 40 tokens from its first span")):
        assert says in ran(command + mistake, 2).err

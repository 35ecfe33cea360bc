"""Records in every form that data sets have: what is text is read, and what would be lost is refused by name."""

import dataclasses
import re

import pytest

from jaxblock.data.config import DataConfig
from jaxblock.data.text import inputs, recipes, sources
from jaxblock.data.text.examples import read_prompts
from jaxblock.data.text.marked import MarkedText, parts_of, read_marked, with_markers
from jaxblock.errors import UserError

CONFIG = recipes.with_recipe(DataConfig(train="x.jsonl", test=None))
PARTS = [{"type": "text", "text": "one "}, {"type": "input_text", "text": "two", "image": None}]
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
SAME_TALK = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
PICTURE = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
BOTH = {"messages": TALK, "problem": "hello", "solution": "another answer"}
TOLD = [{"role": "system", "content": "be kind"}, *TALK]
ALPACA, INPUT = {"prompt_field": "instruction"}, {"input_field": "input"}
SYSTEM = {"system_field": "system_prompt"}
# Two forms of the same conversation, whose user says "hello".
TYPED = [{"type": "text", "text": "hel"}, {"type": "input_text", "text": "lo", "image": None}]
OPENAI = [TOLD[0], {"role": "user", "content": TYPED}, TALK[1] | {"name": "x"}]
SHAREGPT = [{"from": "system", "value": "be kind", "weight": None}, *SAME_TALK]


def prompts(path, config=CONFIG):
    return [prompt for _, prompt in read_prompts(path, config)]


def examples(path, config=CONFIG):
    return list(sources.read_source([inputs.open_input(path, "train")], config, "train", [""]).examples())


def said(content, **more):
    return {"messages": [{"role": "user", "content": content, **more}]}


@pytest.mark.parametrize(
    "record, fields, complaint",
    [
        (said([{"type": "image_url"}]), {}, r"messages\[0\].content\[0\] is of the type 'image_url': the models read"),
        (said([*PARTS, {"type": "image"}]), {}, r".*content\[2\] is of the type 'image'"),
        (said(["text"]), {}, r'.*content\[0\] must be an object with "type" and "text", not a string'),
        (said([{"type": "text", "text": None}]), {}, r".*content\[0\].text must be a string, not null"),
        (said([]), {}, ".*content must be a string, not an empty list"),
        (said([{"type": "text", "text": " "}]), {}, ".*content is empty"),
        (said("x", tool_calls=[{"id": 1}]), {}, ".*holds 'tool_calls', which would be left out"),
        (said("x", reasoning_content="why"), {}, ".*holds 'reasoning_content', .*: write the reasoning into"),
        (said("x", role="assistant", train=False), {}, ".*has 'train': False, and which answers are learnt"),
        (said("x", role="assistant", training=False), {}, ".*has 'training': False, and which answers are learnt"),
        (said("x", images=["cat.jpg"]), {}, ".*holds 'images': the models read only text"),
        (
            BOTH,
            {"prompt_field": "problem", "response_field": "solution"},
            "the fields 'messages' and 'solution' hold two",
        ),
        (
            BOTH,
            {"prompt_field": "problem", "response_field": "solution", "recipe": "math"},
            "the fields 'messages' and",
        ),
        (said("x", weight=0), {}, ".*has the weight 0, and messages have none here"),
        (said("x", role="function"), {}, ".*role 'function'; known are system, developer, user, assistant, tool"),
        ({"messages": [{"from": "function_call", "value": "x"}]}, {}, ".*role 'function_call'; known are human, gpt,"),
        ({"messages": [{"from": ["human"], "value": "x"}]}, {}, ".*the role .'human'.; known are"),
        (said("x", value="bye"), {}, r"messages\[0\] has two texts, 'content' and 'value'"),
        ({"messages": TALK, "conversations": TALK * 2}, {}, "the fields 'messages' and 'conversations' hold two"),
        ({"conversations": PICTURE, "image": "cat.jpg"}, {}, "the messages show an image .*field 'image'"),
        ({"messages": TALK, "system": "be kind"}, {}, "the field 'system' is a system message beside"),
        ({"messages": TOLD, "persona": "rude"}, {"system_field": "persona"}, "the field 'persona' is a system message"),
        ({"conversations": TALK, "tools": '[{"name": "f"}]'}, {}, "the field 'tools' describes tools"),
        ({"question": "q", "system_prompt": "be kind"}, {}, "the field 'system_prompt' is a system message beside"),
        ({"instruction": "q", "input": "1"}, ALPACA, "the field 'input' belongs to the instruction"),
        ({"instruction": "q", "history": ["1"]}, ALPACA, "the field 'history' holds earlier turns"),
        ({"question": "q", "inptu": "1"}, INPUT, r"no field 'input' .did you mean 'inptu'\?.; set data.input_field"),
        ({"question": "q", "input": 3}, INPUT, "field 'input' must be a string"),
    ],
)
def test_what_would_be_lost_is_refused(jsonl, record, fields, complaint):
    path, config = jsonl("some.jsonl", [record]), dataclasses.replace(CONFIG, **fields)
    for read in (prompts, examples):
        with pytest.raises(UserError, match=f"some.jsonl:1: {complaint}"):
            read(path, config)
    with pytest.raises(UserError, match="data.prompt_field and data.input_field are both 'question'"):
        dataclasses.replace(CONFIG, input_field="question").check()


@pytest.mark.parametrize(
    "record, fields, system, asked",
    [
        ({"question": "Add.", "input": "1, 2"}, INPUT, None, "Add.\n1, 2"),
        ({"question": "Add.", "input": ""}, INPUT, None, "Add."),
        ({"question": "Add."}, INPUT | SYSTEM, None, "Add."),
        ({"instruction": "Add.", "input": "", "history": []}, ALPACA, None, "Add."),
        ({"instruction": "Add.", "input": "1, 2"}, {"prompt_field": "input"}, None, "1, 2"),
        ({"question": "q", "system_prompt": "be kind"}, SYSTEM, "be kind", "q"),
        ({"question": "q", "system_prompt": "be kind"}, {"system": "be kind"}, None, "q"),
        ({"question": "q", "system_prompt": None}, SYSTEM | {"system": "all"}, None, "q"),
        ({"conversations": TALK, "system": "be kind"}, {"system_field": "system", "system": "all"}, "be kind", "hello"),
        ({"conversations": TALK, "tools": '[{"name": "f"}]'}, {"system": "f is a"}, None, "hello"),
        ({"messages": TALK, "system": "be kind"}, {"system": "be kind"}, None, "hello"),
        ({"messages": TOLD, "system": "be kind", "tools": [1]}, {}, "be kind", "hello"),
        ({"messages": OPENAI}, {}, "be kind", "hello"),
        ({"conversations": SHAREGPT, "id": 1}, {}, "be kind", "hello"),
        ({"messages": SHAREGPT}, {}, "be kind", "hello"),
        ({"messages": TALK, "conversations": SAME_TALK}, {}, None, "hello"),
        ({"question": "q", "conversations": "kept for graders, as ever"}, {}, None, "q"),
        ({"messages": [TALK[0] | {"value": "hello"}, TALK[1]], "conversations": "two"}, {}, None, "hello"),
        ({"conversations": PICTURE}, {}, None, "<image>\nWhat is it?"),  # a text that only speaks of the tag
    ],
)
def test_every_form_is_read_with_its_system_message_and_its_input(jsonl, record, fields, system, asked):
    """What is learnt and what is decoded have the same prompt."""
    config = dataclasses.replace(CONFIG, prompt_template="<{prompt}>", **fields)
    config.check()
    path = jsonl("some.jsonl", [{**record, "answer": "a"}])
    (prompt,), (example,) = prompts(path, config), examples(path, config)
    is_talk = not {"question", "instruction"} & record.keys()
    told = [] if system is None else [{"role": "system", "content": system}]
    expected = [*told, {"role": "user", "content": asked if is_talk else f"<{asked}>"}]
    assert list(example.messages[:-1]) == expected and example.prompt == asked
    assert prompt == (expected if told or is_talk else asked)
    used = {"messages" if "messages" in record else "conversations"}
    used = {config.system_field} | (used if is_talk else {config.prompt_field, config.input_field, "answer"})
    assert example.fields.keys() == {*record, "answer"} - used


def test_a_prompt_may_end_with_what_a_tool_says(jsonl):
    turns = [*TALK, {"role": "tool", "content": "42", "tool_call_id": "x"}, TALK[1]]
    path = jsonl("some.jsonl", [{"messages": turns}, {"messages": turns[:-1]}])
    assert prompts(path) == [[*TALK, {"role": "tool", "content": "42"}]] * 2


def test_markers_and_pieces():
    assert parts_of("a [[8]] b[[2]][[1]]", "x") == ["a ", 8, " b", 2, 1]
    assert parts_of(["x = [[8]] # ", 3, ""], "x") == ["x = [[8]] # ", 3], "in a list, texts are taken as they are"
    assert parts_of("[[a]] [[-1]] [[ 2 ]] [[3]]", "x") == ["[[a]] [[-1]] [[ 2 ]] ", 3], "what is no number is text"
    assert with_markers(["a ", 8, "b"]) == "a [[8]]b"
    for text, message in [
        ("no marker [8]", "has no span to fill: write [[8]]"),
        (["only text"], "has no span to fill"),
        ("a [[0]]", "a span of 0 tokens"),
        (["a", -2], "a span of -2 tokens"),
        ("[[" + "9" * 5000 + "]]", "more tokens than any model takes"),
        (["a", True, 3], "holds True"),
        (["a", 2.0, 3], "holds 2.0"),
        ({"a": 3}, "must be a text with spans"),
        (None, "must be a text with spans"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            parts_of(text, "x.jsonl:3")


def test_texts_with_spans_are_read_of_records(jsonl):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A [[2]]"}]
    records = [{"question": "Q", "answer": "A [[2]]"}, {"answer": ["A ", 2], "id": 7}, {"messages": turns}]
    for bad, message in [
        ({"text": "[[2]]"}, "no field 'answer' with the text to fill; set data.response_field to one of 'text'"),
        ({"answer": "[[2]]", "questoin": "Q"}, "no field 'question' (did you mean 'questoin'?)"),
        ({"messages": turns[:1]}, "must end with a turn of the user and one of the assistant"),
        ({"answer": "none", "question": "Q"}, "has no span"),
        ({"answer": "[[1]]", "question": 3}, "field 'question' must be a string"),
    ]:
        path = jsonl("texts.jsonl", [*records, bad])
        found = read_marked(path, CONFIG)
        assert [next(found)[1] for _ in records] == [MarkedText(["A ", 2], prompt) for prompt in ("Q", None, turns[:1])]
        with pytest.raises(UserError, match=re.escape(f"{path}:4") + ".*" + re.escape(message)):
            next(found)

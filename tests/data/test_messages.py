"""Conversations in every form that data sets have: what is text is read, and what would be lost is refused by name."""

import contextlib
import dataclasses
import json
from typing import Any

import pytest

from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import examples_of, read_prompts
from jaxblock.data.text.inputs import open_input, read_rows
from jaxblock.data.text.messages import checked_messages
from jaxblock.data.text.recipes import with_recipe
from jaxblock.data.text.sources import read_source
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.find_special import find_special
from jaxblock.errors import UserError

CONFIG = with_recipe(DataConfig(train="x.jsonl", test=None))
PARTS = [{"type": "text", "text": "one "}, {"type": "input_text", "text": "two", "image": None}]
TOOL = [
    {"role": "developer", "content": "d"},
    {"role": "user", "content": "6*7?"},
    {"role": "assistant", "content": "call(6*7)"},
    {"role": "tool", "content": "42", "tool_call_id": "x"},
    {"role": "assistant", "content": "It is 42."},
]


TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


@pytest.mark.parametrize(
    "record, complaint",
    [
        ({"messages": TALK, "conversations": [*TALK, *TALK]}, "the fields 'messages' and 'conversations' hold two"),
        ({"messages": [TALK[0] | {"value": "bye"}, TALK[1]]}, r"messages\[0\] has two texts, 'content' and 'value'"),
        ({"messages": TALK, "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]}, None),
        ({"messages": [TALK[0] | {"value": "hello"}, TALK[1] | {"name": "x"}], "conversations": "two"}, None),
    ],
)  # fmt: skip
def test_a_record_says_one_thing(tmp_path, record, complaint):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(record))
    reads = [
        lambda: list(read_prompts(str(path), CONFIG)),
        lambda: list(read_source([open_input(str(path), "train")], CONFIG, "train", [""]).examples()),
    ]
    for read in reads:
        with pytest.raises(UserError, match=f"some.jsonl:1: {complaint}") if complaint else contextlib.nullcontext():
            assert len(read()) == 1


def test_every_form_gives_the_same_conversation(tmp_path):
    path = tmp_path / "some.jsonl"
    openai = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": PARTS},
        {"role": "assistant", "content": "a"},
    ]
    names = [("system", "s"), ("human", "one two"), ("gpt", "a")]
    sharegpt = [{"from": name, "value": text, "weight": None} for name, text in names]
    lines: list[dict[str, Any]] = [{"messages": openai}, {"conversations": sharegpt, "id": 1}, {"messages": sharegpt}]
    lines.append({"question": "q", "answer": "a", "conversations": "kept for graders, as ever"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = list(read_source([open_input(str(path), "train")], CONFIG, "train", [""]).examples())
    assert [dict(m) for m in found[0].messages] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "a"},
    ]
    assert found[0].messages == found[1].messages == found[2].messages and found[0].prompt == "one two"
    assert [example.fields for example in found[1:]] == [{"id": 1}, {}, {"conversations": lines[3]["conversations"]}]
    prompts = [prompt for _, prompt in read_prompts(str(path), CONFIG)]
    assert prompts[:3] == [list(found[0].messages[:-1])] * 3 and prompts[3] == "q"
    path.write_text(json.dumps({"messages": TOOL}) + "\n" + json.dumps({"messages": TOOL[:-1]}))
    assert [len(prompt) for _, prompt in read_prompts(str(path), CONFIG)] == [4, 4]


@pytest.mark.parametrize(
    "message, complaint",
    [
        (
            {"content": [{"type": "image_url", "image_url": {}}]},
            r"content\[0\] is of the type 'image_url': the models read only",
        ),
        ({"content": [*PARTS, {"type": "image"}]}, r"content\[2\] is of the type 'image'"),
        ({"content": ["text"]}, r'content\[0\] must be an object with "type" and "text", not a string'),
        ({"content": [{"type": "text", "text": None}]}, r"content\[0\].text must be a string, not null"),
        ({"content": []}, "content must be a string, not an empty list"),
        ({"content": [{"type": "text", "text": " "}]}, "content is empty"),
        ({"content": "x", "tool_calls": [{"id": 1}]}, "holds 'tool_calls', which would be left out"),
        ({"content": "x", "reasoning_content": "why"}, "holds 'reasoning_content', .*: write the reasoning into"),
        ({"role": "assistant", "content": "x", "train": False}, "has 'train': False, and which answers are learnt"),
        ({"content": "x", "weight": 0}, "has the weight 0, and messages have none here"),
        ({"content": "x", "role": "function"}, "role 'function'; known are system, developer, user, assistant, tool"),
        ({"from": "function_call", "value": "x", "role": None}, "role 'function_call'; known are human, gpt,"),
        ({"from": ["human"], "value": "x", "role": None}, "the role .'human'.; known are"),
    ],
)
def test_what_would_be_lost_is_refused(message, complaint):
    other = {key: value for key, value in {"role": "user", **message}.items() if value is not None}
    with pytest.raises(UserError, match=r"some.jsonl:7: m\[0\].*" + complaint):
        checked_messages([other], "the messages", "m", "some.jsonl:7")


def test_a_picture_that_a_record_shows_is_refused(tmp_path):
    path = tmp_path / "some.jsonl"
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    for record, fine in [({"conversations": talk, "image": "cat.jpg"}, False), ({"conversations": talk}, True)]:
        path.write_text(json.dumps(record))
        if fine:  # a text that only speaks of the tag
            assert len(list(read_prompts(str(path), CONFIG))) == 1
            continue
        with pytest.raises(UserError, match=r"some.jsonl:1: the messages show an image .*field 'image'"):
            list(read_prompts(str(path), CONFIG))


@pytest.mark.parametrize(
    "record, complaint, fine",
    [
        (
            {"messages": TALK, "system": "be kind"},
            "the field 'system' is a system message beside",
            {"system": "be kind"},
        ),
        ({"messages": [{"role": "system", "content": "be kind"}, *TALK], "system": "be kind", "tools": [1]}, None, {}),
        (
            {"conversations": TALK, "tools": '[{"name": "f"}]'},
            "the field 'tools' describes tools",
            {"system": "f is a"},
        ),
        (
            {"question": "q", "answer": "a", "system_prompt": "be kind"},
            "the field 'system_prompt'",
            {"system": "be kind"},
        ),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            "the field 'input' belongs to the instruction",
            {"prompt_field": "input"},
        ),
        ({"instruction": "Add.", "input": "", "output": "3", "history": []}, None, {}),
    ],
)
def test_what_stands_beside_the_prompt_is_not_left_out(tmp_path, record, complaint, fine):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(record))
    config = dataclasses.replace(CONFIG, **({"prompt_field": "instruction"} if "input" in record else {}))
    if complaint is not None:
        with pytest.raises(UserError, match=f"some.jsonl:1: {complaint}"):
            list(read_prompts(str(path), config))
    assert len(list(read_prompts(str(path), dataclasses.replace(config, **fine)))) == 1


@pytest.mark.parametrize(
    "record, fields, system, asked",
    [
        ({"question": "Add.", "input": "1, 2"}, {"input_field": "input"}, None, "Add.\n1, 2"),
        ({"question": "Add.", "input": ""}, {"input_field": "input"}, None, "Add."),
        ({"question": "Add."}, {"input_field": "input", "system_field": "system_prompt"}, None, "Add."),
        ({"question": "q", "system_prompt": "be kind"}, {"system_field": "system_prompt"}, "be kind", "q"),
        ({"question": "q", "system_prompt": None}, {"system_field": "system_prompt", "system": "all"}, None, "q"),
        ({"conversations": TALK, "system": "be kind"}, {"system_field": "system", "system": "all"}, "be kind", "hello"),
    ],
)
def test_a_system_message_and_an_input_in_fields_of_their_own(tmp_path, record, fields, system, asked):
    """What is learnt and what is decoded have the same prompt."""
    config = dataclasses.replace(CONFIG, prompt_template="<{prompt}>", **fields)
    config.check()
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({**record, "answer": "a"}))
    ((_, prompt),) = read_prompts(str(path), config)
    (example,) = examples_of(next(iter(read_rows(str(path), "train"))), config)
    said = [] if system is None else [{"role": "system", "content": system}]
    expected = asked if "conversations" in record else f"<{asked}>"
    assert list(example.messages[:-1]) == [*said, {"role": "user", "content": expected}] and example.prompt == asked
    assert prompt == (list(example.messages[:-1]) if said or "conversations" in record else asked)
    assert not {"input", "system_prompt", "system"} & example.fields.keys()


@pytest.mark.parametrize(
    "record, fields, complaint",
    [
        (
            {"question": "q", "inptu": "1"},
            {"input_field": "input"},
            r"no field 'input' \(did you mean 'inptu'\?\); set data.input_field",
        ),
        ({"question": "q", "input": 3}, {"input_field": "input"}, "field 'input'"),
        (
            {"messages": [{"role": "system", "content": "be brief"}, *TALK], "persona": "be kind"},
            {"system_field": "persona"},
            "the field 'persona' is a system message beside",
        ),
    ],
)
def test_fields_of_a_prompt_that_cannot_be_read(tmp_path, record, fields, complaint):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"some.jsonl:1: {complaint}"):
        list(read_prompts(str(path), dataclasses.replace(CONFIG, **fields)))
    with pytest.raises(UserError, match="data.prompt_field and data.input_field are both 'question'"):
        dataclasses.replace(CONFIG, input_field="question").check()


CHATML = "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content + '<|eot_id|>' }}{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
ALIAS = CHATML.replace("m.role +", "('system' if m.role == 'developer' else m.role) +")
REFUSING = (
    "{% if messages | selectattr('role', 'equalto', 'tool') | list %}{{ raise_exception('only users') }}{% endif %}"
    + CHATML
)
DROPPING = CHATML.replace("messages %}", "messages if m.role != 'tool' %}", 1)
AS_USER = CHATML.replace("m.role +", "('assistant' if m.role == 'assistant' else 'user') +")


@pytest.mark.parametrize(
    "source, complaint",
    [
        (CHATML, None),
        (ALIAS, None),
        (REFUSING, "has no role 'developer' or 'tool', or not in this place .*only users.*: take"),
        (DROPPING, "has no role 'tool': it leaves its messages out"),
        (AS_USER, "has no role 'developer': it writes its messages as the user's"),
    ],
)
def test_roles_that_not_every_template_has(pieces, source, complaint):
    template, special = find_special(pieces, "mine", source, CONFIG, {})
    encoder = Encoder(pieces, template, special, dataclasses.replace(CONFIG, system="not put before a developer's"))
    messages = checked_messages(TOOL[:-1], "the messages", "m", "here")
    if complaint is None:
        text = pieces.decode(encoder.prompt(messages, where="here"), skip_special=False)
        assert text.endswith("42<|eot_id|><|start_header_id|>assistant<|end_header_id|>") and "not put" not in text
        return
    with pytest.raises(UserError, match=f"here: template 'mine' {complaint}"):
        encoder.prompt(messages, where="here")

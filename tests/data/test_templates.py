"""Templates and the boundary between prompt and response, in tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Example
from jaxblock.data.tokens import bounded_jinja
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.find_special import find_special
from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.data.tokens.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from jaxblock.data.tokens.templates import Template, template_source
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.errors import UserError


def _example(prompt: str = "How many?", response: str = "5 + 7 = 12\n#### 12") -> Example:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
    return Example(messages, prompt, response, "some.jsonl:3", "some.jsonl:3", "some.jsonl:3")


def _encoder(tokenizer: Tokenizer, source: str, **settings: str) -> Encoder:
    config = DataConfig(**settings)
    template, ids = find_special(tokenizer, "mine", source, config, {})
    return Encoder(tokenizer, template, ids, config)


def _show(encoder: Encoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids, skip_special=False)


def _turn(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


ASKED = f"{_turn('user')}How many?<|eot_id|>{_turn('assistant')}"


@pytest.mark.parametrize(
    ("name", "system", "prompt"),
    [
        ("chat", None, f"<|startoftext|>{ASKED}"),
        ("chat", "Be brief.", f"<|startoftext|>{_turn('system')}Be brief.<|eot_id|>{ASKED}"),
        ("plain", None, "Question: How many?\nAnswer:<|eot_id|>"),
        ("plain", "Be brief.", "Be brief.\n\nQuestion: How many?\nAnswer:<|eot_id|>"),
    ],
)
def test_named_templates(pieces: SentencePieceTokenizer, name: str, system: str | None, prompt: str) -> None:
    encoder = _encoder(pieces, template_source(name), **({"system": system} if system else {}))
    prompt_ids, response_ids = encoder.prompt_and_response(_example(response=" 5 + 7 = 12\n#### 12 \n"))
    assert _show(encoder, prompt_ids) == prompt
    assert _show(encoder, response_ids) == "5 + 7 = 12\n#### 12<|eot_id|>"
    assert encoder.prompt("How many?") == prompt_ids


def test_a_records_own_system_message_wins(pieces: SentencePieceTokenizer) -> None:
    encoder = _encoder(pieces, template_source("plain"), system="Be brief.")
    messages = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Why?"}]
    assert _show(encoder, encoder.prompt(messages)).startswith("Be long.\n\nQuestion: Why?")


def test_turns_before_the_last_are_prompt(pieces: SentencePieceTokenizer) -> None:
    encoder = _encoder(pieces, template_source("plain"))
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    prompt_ids, response_ids = encoder.prompt_and_response(Example(messages, "", "", "x:1", "x:1", "x:1"))
    assert _show(encoder, prompt_ids) == "Question: a\nAnswer:<|eot_id|>b<|eot_id|>Question: c\nAnswer:<|eot_id|>"
    assert _show(encoder, response_ids) == "d<|eot_id|>"


def test_the_header_that_lladas_template_always_appends_is_dropped(tokenizer_folder: Callable[..., str]) -> None:
    tokenizer = load_tokenizer(tokenizer_folder())
    source = template_source("tokenizer", tokenizer_template=tokenizer.settings["chat_template"])
    theirs = _encoder(tokenizer, source)
    ours = _encoder(tokenizer, template_source("chat"))
    assert theirs.template.render(_example().messages, False).endswith(_turn("assistant"))
    assert theirs.prompt_and_response(_example()) == ours.prompt_and_response(_example())


TURNS = "{% for m in messages %}{{ m.content }}{{ eot_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        # no boundary: the prompt's "1" and the response's "2" become one token
        (
            "{{ messages[0].content }}{% if messages[1] %}{{ messages[1].content }}{{ eot_token }}{% endif %}",
            r"changes the prompt's tokens: token 7 is '.1' \(id \d+\) in the prompt alone and '.12' \(id \d+\) once",
        ),
        (
            "{{ bos_token if add_generation_prompt }}" + TURNS,
            r"changes the prompt's tokens: token 0 is '<\|startoftext\|>'",
        ),
        (
            "{{ messages[0].content }}{{ eot_token }}{{ messages[1].content if messages[1] }}",
            "does not end the response",
        ),
        ("{{ messages[0].content }}{{ eot_token }}{{ eot_token if messages[1] }}", "leaves nothing of the response"),
        (TURNS + "{{ 'Bye' if messages[1] }}", "writes more after the response's end: 'Bye'"),
        ("{{ '<|mdm_mask|>' }}" + TURNS, "the prompt's tokens contain the mask token"),
        (
            TURNS.replace("{{ m", "{{ '<|mdm_mask|>' if loop.index0 }}{{ m"),
            "the response's tokens contain the mask token",
        ),
        ("{{ raise_exception('no such role') }}", "template 'mine' fails on it: no such role"),
        ("{{ messages[0].content + 1 }}", "template 'mine' fails on it"),
        ("{{ messages.__class__.__mro__ }}", "template 'mine' fails on it: .*unsafe"),
        ("{% for m in messages %}\n{{ m.content }}", "template 'mine', line 2"),
    ],
)
def test_bad_templates(pieces: SentencePieceTokenizer, source: str, complaint: str) -> None:
    tokenizer: Tokenizer = pieces
    if "alone and" in complaint:
        tokenizer = train_tokenizer(["1234 12 34 1"] * 50, DataConfig(vocab_size=400))
    with pytest.raises(UserError, match=complaint) as caught:
        _encoder(tokenizer, source).prompt_and_response(_example("What is 1", "234"))
    assert "some.jsonl:3" in str(caught.value) or "line 2" in complaint


def test_a_newline_after_the_terminator_is_dropped(pieces: SentencePieceTokenizer) -> None:
    source = "{% for m in messages %}{{ m.role + '\\n' + m.content + eot_token + '\\n' }}{% endfor %}"
    source += "{{ 'assistant\\n' if add_generation_prompt }}"
    encoder = _encoder(pieces, source)
    prompt_ids, response_ids = encoder.prompt_and_response(_example("q", "a"))
    assert _show(encoder, prompt_ids) == "user\nq<|eot_id|>\nassistant\n"
    assert _show(encoder, response_ids) == "a<|eot_id|>"


@pytest.mark.parametrize("token", ["<|mdm_mask|>", "<|eot_id|>", "<|endoftext|>", "<|start_header_id|>"])
@pytest.mark.parametrize("side", ["prompt", "response"])
def test_special_tokens_in_a_records_text_are_refused(pieces: SentencePieceTokenizer, token: str, side: str) -> None:
    encoder = _encoder(pieces, template_source("chat"))
    role = {"prompt": "user", "response": "assistant"}[side]
    with pytest.raises(UserError) as caught:
        encoder.prompt_and_response(_example(**{side: f"take {token} out"}))
    assert f"some.jsonl:3: the {role}'s text contains the special token '{token}' at character 5" in str(caught.value)


FEATURES = [
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}\n"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "{% set n = 1 %}{% generation %}{% set n = 2 %}{{ n }}{% endgeneration %}{{ n }}",
    "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}",
    "{%- if tools is not none %}{{ 'tools' }}{% endif %}{%- if documents %}{{ 'documents' }}{% endif %}{{ missing }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "   {% set ns = namespace(found=false) %}\n  {% for m in messages %}\n{% set ns.found = true %}  {% endfor %}{{ ns.found }}",
    "{{ bos_token }}{{ strftime_now('%Y') }}{{ messages[0]['content'].split('a')[-1].strip() }}{{ messages[-1:] | length }}",
    "{% if strftime_now is defined and messages is iterable and messages is not mapping %}{{ 'yes' }}{% endif %}",
    "{% macro shown(m) %}{{ m.role | upper }}: {{ m.content }}{% endmacro %}{{ shown(messages[0]) }}"
    "{{ add_generation_prompt }}",
]
"""What templates of real checkpoints use."""


@pytest.mark.parametrize("source", FEATURES)
def test_templates_render_as_transformers_renders_them(source: str) -> None:
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": "a “quoted” <b> a"}, {"role": "assistant", "content": "b\n"}]
    for ask in (False, True):
        expected, _ = theirs.render_jinja_template(
            [messages], chat_template=source, add_generation_prompt=ask, bos_token="<s>"
        )
        assert Template("mine", source, {"bos_token": "<s>"}).render(messages, ask) == expected[0]


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ documents[0].title }}", "fails on it: None has no element 0"),
        ("{% generation %}{{ messages[0].content }}", "line 1: Unexpected end of template"),
        ("{{ missing | tojson }}", "fails on it: .*Undefined"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "fails on it: maximum recursion"),
        ("{% include 'other' %}", "fails on it: no loader"),
        ("{{ messages.append(1) }}", "fails on it: .*unsafe|not safely"),
    ],
)
def test_what_a_template_cannot_do_is_said(source: str, complaint: str) -> None:
    with pytest.raises(UserError, match=f"template 'mine'.*{complaint}"):
        Template("mine", source).render([{"role": "user", "content": "q"}], False)


def test_finding_templates(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ bos_token }}<|im_start|> <|im_start|>")
    source = template_source(str(path))
    assert Template("mine", source).control_tokens() == ("<|im_start|>",)
    assert template_source("tokenizer", tokenizer_template=[{"name": "default", "template": "x"}]) == "x"
    for name, complaint in [("chatt", "neither one of chat, plain, tokenizer nor a file"), ("tokenizer", "no chat")]:
        with pytest.raises(UserError, match=complaint):
            template_source(name)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        template_source(str(path))


def test_gsm8k_keeps_the_boundary(shared: Path, pieces: SentencePieceTokenizer) -> None:
    encoder = _encoder(pieces, template_source("chat"))
    with open(shared / "data/gsm8k/test.jsonl") as file:
        records = [json.loads(line) for line in list(file)[:100]]
    for record in records:
        _, response_ids = encoder.prompt_and_response(_example(record["question"], record["answer"]))
        assert _show(encoder, response_ids) == record["answer"].strip() + "<|eot_id|>"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1,000 rounds"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "more than 1,000 rounds",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' * 10**11 }}", "too large"),
        ("{{ [1] * 10**10 }}", "too large"),
        ("{% set s = namespace(v='aaaa') %}{% for i in range(60) %}{% set s.v = s.v ~ s.v %}{% endfor %}", "too large"),
        ("{% set s = namespace(v='aaaa') %}{% for i in range(60) %}{% set s.v = s.v + s.v %}{% endfor %}", "too large"),
        ("{{ 'a'.center(10**11) }}{{ 1 }}", "too large"),
        ("{{ 'a' | center(10**11) }}", "too large"),
        ("{{ '%1000000000000d' % 1 }}", "too large"),
        ("{{ '{:>1000000000000}'.format(1) }}", "too large"),
        ("{{ ('a' * 100000).replace('a', 'b' * 100000) }}", "too large"),
        ("{{ 10 ** (10 ** 8) }}", "too large"),
        ("{{" + "(" * 20_000 + "1" + ")" * 20_000 + "}}", "recursion"),
        ("{{ lipsum(n=10**6) }}", "'lipsum' is undefined"),
    ],
)
def test_a_strangers_template_ends_soon_and_stays_small(
    source: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_jinja, "MOST_ROUNDS", 1000)
    with pytest.raises(UserError, match=f"a.jsonl:1: template 'theirs' fails on it: .*{complaint}"):
        Template("theirs", source).render([{"role": "user", "content": "q"}], True, where="a.jsonl:1")


@pytest.mark.parametrize("brought", [[5], [None], [{"name": []}], [{"name": "default", "template": 5}], {}, 5])
def test_a_chat_template_of_a_wrong_type_is_refused(brought: object) -> None:
    with pytest.raises(UserError, match="the tokenizer came with no chat template"):
        template_source("tokenizer", tokenizer_template=brought)

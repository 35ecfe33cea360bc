"""Templates, the boundary of prompt and response, spans to fill, and texts that would become control tokens."""

import dataclasses
import json

import pytest
import tokenizers

from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Example
from jaxblock.data.text.marked import MarkedText
from jaxblock.data.tokens import bounded_jinja
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.find_special import find_special
from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.data.tokens.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from jaxblock.data.tokens.spans import encode_spans, filled_text, fills_of, plain_encoder
from jaxblock.data.tokens.special import SpecialIds
from jaxblock.data.tokens.templates import NAMED, Template, template_source
from jaxblock.data.tokens.tokenizer_json import HuggingFaceTokenizer
from jaxblock.errors import UserError


def talk(*texts, roles=("user", "assistant")):
    return tuple({"role": roles[at % 2], "content": text} for at, text in enumerate(texts))


def example(prompt="How many?", response="5 + 7 = 12\n#### 12"):
    return Example(talk(prompt, response), prompt, response, *["some.jsonl:3"] * 3)


def encoder_of(tokenizer, source=NAMED["chat"], **settings):
    config = DataConfig(**settings)
    template, ids = find_special(tokenizer, "mine", source, config, {})
    return Encoder(tokenizer, template, ids, config)


def shown(encoder, *parts):
    return [encoder.tokenizer.decode(ids, skip_special=False) for ids in parts]


def turn(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


ASKED = f"{turn('user')}How many?<|eot_id|>{turn('assistant')}"


@pytest.mark.parametrize(
    "name, system, prompt",
    [
        ("chat", None, f"<|startoftext|>{ASKED}"),
        ("chat", "Be brief.", f"<|startoftext|>{turn('system')}Be brief.<|eot_id|>{ASKED}"),
        ("plain", None, "Question: How many?\nAnswer:<|eot_id|>"),
        ("plain", "Be brief.", "Be brief.\n\nQuestion: How many?\nAnswer:<|eot_id|>"),
    ],
)
def test_named_templates(pieces, name, system, prompt):
    encoder = encoder_of(pieces, template_source(name), system=system)
    ids, response = encoder.prompt_and_response(example(response=" 5 + 7 = 12\n#### 12 \n"))
    assert shown(encoder, ids, response) == [prompt, "5 + 7 = 12\n#### 12<|eot_id|>"]
    assert encoder.prompt("How many?") == ids
    own = encoder.prompt(talk("Be long.", "How many?", roles=("system", "user")))
    assert system is None or shown(encoder, own) == [prompt.replace("brief", "long")]  # the record's own wins
    assert shown(encoder_of(pieces, TURNS, system=""), encoder_of(pieces, TURNS, system="").prompt("a")) == [
        "<|eot_id|>a<|eot_id|>"
    ]
    turns = encoder.prompt_and_response(dataclasses.replace(example(), messages=talk("a", "b", "How many?", "d")))
    earlier = "Question: a\nAnswer:<|eot_id|>b<|eot_id|>"
    assert name == "chat" or shown(encoder, *turns) == [prompt.replace("Question", f"{earlier}Question"), "d<|eot_id|>"]
    # Blanks after the response's end are dropped.
    _, response = encoder_of(pieces, TURNS + "{{ '\\n' if messages[1] }}").prompt_and_response(example())
    assert shown(encoder, response) == ["5 + 7 = 12\n#### 12<|eot_id|>"]


FIRST, TURNS = "{{ messages[0].content }}", "{% for m in messages %}{{ m.content }}{{ eot_token }}{% endfor %}"
ALONE = r"changes the prompt's tokens: token 7 is '.1' \(id \d+\) in the prompt alone and '.12' \(id \d+\) once"
MASK = "{{ '<|mdm_mask|>' }}"
ONLY_SYSTEM = "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "source, complaint",
    [
        # no boundary: the prompt's "1" and the response's "2" become one token
        (FIRST + "{% if messages[1] %}{{ messages[1].content }}{{ eot_token }}{% endif %}", ALONE),
        ("{{ bos_token if add_generation_prompt }}" + TURNS, r"the prompt's tokens: token 0 is '<\|startoftext\|>'"),
        (FIRST + "{{ eot_token }}{{ messages[1].content if messages[1] }}", "does not end the response"),
        (
            FIRST + "{{ eot_token }}{{ eot_token if messages[1] }}",
            r"leaves out the assistant's text \(message 2 of 2\)",
        ),
        (TURNS.replace("m.content", "m.content.split('5')[-1]"), "does not write the whole response"),
        (TURNS + "{{ 'Bye' if messages[1] }}", "writes more after the response's end: 'Bye'"),
        (MASK + TURNS, "the prompt's tokens contain the mask token"),
        (TURNS.replace("{{ m", "{{ '<|mdm_mask|>' if loop.index0 }}{{ m"), "the response's tokens contain the mask"),
        ("{{ raise_exception('no such role') }}", "template 'mine' fails on it: no such role"),
        ("{{ messages[0].content + 1 }}", "template 'mine' fails on it"),
        ("{{ messages.__class__.__mro__ }}", "template 'mine' fails on it: .*unsafe"),
        ("{% for m in messages %}\n{{ m.content }}", "template 'mine', line 2"),
        ("{{ '<|start_header_id|>' }}", "leaves out the user's text"),
        (ONLY_SYSTEM, "leaves out the user's text"),
        (TURNS.replace("messages %}", "messages if m.role != 'system' %}"), "leaves out the system's text"),
    ],
)
def test_bad_templates(pieces, source, complaint):
    tokenizer = train_tokenizer(["1234 12 34 1"] * 50, DataConfig(vocab_size=400)) if complaint == ALONE else pieces
    with pytest.raises(UserError, match=complaint) as caught:
        encoder = encoder_of(tokenizer, source, system="Be brief." if "system" in complaint else None)
        encoder.prompt_and_response(example("What is 1", "234" if complaint == ALONE else "2 5 34"))
    assert "some.jsonl:3" in str(caught.value) or "line 2" in complaint


@pytest.mark.parametrize("token", ["<|mdm_mask|>", "<|eot_id|>", "<|endoftext|>", "<|start_header_id|>"])
def test_special_tokens_in_a_records_text_are_refused(pieces, token):
    for side, role in {"prompt": "user", "response": "assistant"}.items():
        with pytest.raises(UserError) as caught:
            encoder_of(pieces).prompt_and_response(example(**{side: f"take {token} out"}))
        said = f"some.jsonl:3: the {role}'s text contains the special token '{token}' at character 5"
        assert said in str(caught.value)


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
def test_templates_render_as_transformers_renders_them(source):
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = list(talk("a “quoted” <b> a", "b\n"))
    for ask in (False, True):
        options = {"chat_template": source, "add_generation_prompt": ask, "bos_token": "<s>"}
        expected, _ = theirs.render_jinja_template([messages], **options)
        assert Template("mine", source, {"bos_token": "<s>"}).render(messages, ask) == expected[0]


CALLS_ITSELF = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
DOUBLING = "{% set s = namespace(v='aaaa') %}{% for i in range(60) %}{% set s.v = s.v OP s.v %}{% endfor %}"
TOO_LARGE = [
    "{{ 'a' * 10**11 }}",
    "{{ [1] * 10**10 }}",
    DOUBLING.replace("OP", "~"),
    DOUBLING.replace("OP", "+"),
    "{{ 'a'.center(10**11) }}{{ 1 }}",
    "{{ 'a' | center(10**11) }}",
    "{{ '%1000000000000d' % 1 }}",
    "{{ '{:>1000000000000}'.format(1) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ 10 ** (10 ** 8) }}",
]


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("{{ documents[0].title }}", "fails on it: None has no element 0"),
        ("{% generation %}{{ messages[0].content }}", "line 1: Unexpected end of template"),
        ("{{ missing | tojson }}", "fails on it: .*Undefined"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "fails on it: .*recursion"),
        ("{% include 'other' %}", "fails on it: no loader"),
        ("{{ messages.append(1) }}", "fails on it: .*unsafe|not safely"),
        # A stranger's template ends soon and stays small.
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1,000 rounds"),
        (CALLS_ITSELF, "more than 1,000 rounds"),
        ("{{" + "(" * 20_000 + "1" + ")" * 20_000 + "}}", "recursion"),
        ("{{ lipsum(n=10**6) }}", "'lipsum' is undefined"),
        *((source, "too large") for source in TOO_LARGE),
    ],
)
def test_what_a_template_cannot_do_is_said(source, complaint, monkeypatch):
    monkeypatch.setattr(bounded_jinja, "MOST_ROUNDS", 1000)
    with pytest.raises(UserError, match=f"template 'mine'.*{complaint}") as caught:
        Template("mine", source).render(list(talk("q")), True, where="a.jsonl:1")
    assert str(caught.value).startswith("a.jsonl:1: ") or "line 1" in complaint


def test_finding_templates(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ bos_token }}<|im_start|> <|im_start|>")
    assert Template("mine", template_source(str(path))).control_tokens() == ("<|im_start|>",)
    assert template_source("tokenizer", tokenizer_template=[{"name": "default", "template": "x"}]) == "x"
    path.write_bytes(b"\xff")
    absent = [
        ("tokenizer", it) for it in (None, [5], [None], [{"name": []}], [{"name": "default", "template": 5}], {}, 5)
    ]
    for name, brought, complaint in [
        ("chatt", None, "neither one of chat, plain, tokenizer nor a file"),
        (str(path), None, "not UTF-8"),
        *((*each, "the tokenizer came with no chat template") for each in absent),
    ]:
        with pytest.raises(UserError, match=complaint):
            template_source(name, tokenizer_template=brought)


HEADS = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content + '<|eot_id|>' }}{% endfor %}"
CHATML = "{% for m in messages %}" + HEADS
CHATML += "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
REFUSING = "{% if 'tool' in messages | map(attribute='role') %}{{ raise_exception('only users') }}{% endif %}" + CHATML
DROPPING = CHATML.replace("messages %}", "messages if m.role != 'tool' %}", 1)
AS_USER = CHATML.replace("m.role +", "('assistant' if m.role == 'assistant' else 'user') +")


@pytest.mark.parametrize(
    "source, complaint",
    [
        (CHATML, None),
        (CHATML.replace("m.role +", "('system' if m.role == 'developer' else m.role) +"), None),
        (REFUSING, "has no role 'developer' or 'tool', or not in this place .*only users.*: take"),
        (DROPPING, "has no role 'tool': it leaves its messages out"),
        (AS_USER, "has no role 'developer': it writes its messages as the user's"),
    ],
)
def test_roles_that_not_every_template_has(pieces, source, complaint):
    encoder = encoder_of(pieces, source, system="not put before a developer's")
    called = talk("6*7?", "call(6*7)")
    messages = [{"role": "developer", "content": "d"}, *called, {"role": "tool", "content": "42"}]
    if complaint is None:
        (text,) = shown(encoder, encoder.prompt(messages, where="here"))
        assert text.endswith("42<|eot_id|><|start_header_id|>assistant<|end_header_id|>") and "not put" not in text
        return
    with pytest.raises(UserError, match=f"here: template 'mine' {complaint}"):
        encoder.prompt(messages, where="here")


SPECIAL = ("<|mask|>", "<|eos|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
EDITING = NAMED["chat"].replace("message['content'] | trim", "message['content'] | replace('*', '')")
HARMLESS = "Is 2*3 < 7 or >, ﬁne | so? ４２ <eot_id|> Ünïcode 你好"
NORMALISERS = tokenizers.normalizers


def tokenizer_json_with(normaliser):
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    built = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    built.normalizer, built.pre_tokenizer = normaliser, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens([tokenizers.AddedToken(text, normalized=True) for text in SPECIAL])
    return HuggingFaceTokenizer({"tokenizer.json": built.to_str().encode(), "tokenizer_config.json": b"{}"}, "test")


def bare_encoder(tokenizer, source=NAMED["chat"], system=None):
    ids = [tokenizer.id_of(text) for text in SPECIAL[:3]]
    template = Template("mine", source, {"bos_token": "", "eos_token": SPECIAL[1], "eot_token": SPECIAL[2]})
    return Encoder(tokenizer, template, SpecialIds(*ids, pad=ids[1]), DataConfig(system=system))


# A tokenizer.json's normaliser, or the name of a SentencePiece model's, and a text.
CASES = {
    "full-width brackets, SentencePiece": ("nmt_nfkc", "x＜|eot_id|＞ y"),
    "control letter, SentencePiece": ("nmt_nfkc", "<|start_header\x07_id|>"),
    "full-width letters": (NORMALISERS.NFKC(), "<|ｅot_id|>"),
    "capitals": (NORMALISERS.Lowercase(), "<|EOT_id|>"),
    "invisible letter": (NORMALISERS.Replace("\u200b", ""), "<|m\u200bask|>"),
    "accents": (NORMALISERS.BertNormalizer(lowercase=True), "<|éos|>"),
    "a template that edits texts": (NORMALISERS.NFC(), "<|eot*_id|>"),
}


@pytest.mark.parametrize("case", CASES)
def test_text_that_becomes_a_control_token_is_refused_with_its_place(sentencepiece_model, case):
    normaliser, text = CASES[case]
    if normaliser == "nmt_nfkc":
        texts = ["user assistant system said some words and numbers 0123456789 <|>_"] * 20
        options = {"model_type": "char", "vocab_size": 400, "user_defined_symbols": [*SPECIAL, "\n"]}
        options |= {"normalization_rule_name": normaliser, "add_dummy_prefix": False}
        tokenizer = SentencePieceTokenizer({"tokenizer.model": sentencepiece_model(texts, **options)}, "test")
    else:
        tokenizer = tokenizer_json_with(normaliser)
    source = EDITING if "edits" in case else NAMED["chat"]
    encodes = bare_encoder(tokenizer, source)
    refusal = r"^in\.jsonl:7: the \w+'s text ch\w+ the control tokens: .*control token \d"
    for turns in (
        talk(f"a {text} b"),
        talk("a", f"b {text}", "c"),
        talk(text, "a", roles=("system", "user")),
    ):
        with pytest.raises(UserError, match=refusal):
            encodes.prompt(turns, where="in.jsonl:7")
    with pytest.raises(UserError, match=r"the system's text changes the control tokens"):
        bare_encoder(tokenizer, source, system=text).prompt("a", where="in.jsonl:7")
    assert encodes.prompt(HARMLESS) != encodes.prompt("other")


CONVERSATION = list(talk("a\n", " b", "c"))


def encoders_with_spans(tokenizer, without_mask=False):
    """Returns the encoder with a chat template and the plain one; if wanted, the tokenizer has no text for the mask."""
    config = DataConfig(system="Be brief.", prompt_template="Q: {prompt}")
    template, special = find_special(tokenizer, "chat", NAMED["chat"], config, {})
    special = dataclasses.replace(special, mask=tokenizer.vocab_size) if without_mask else special
    return Encoder(tokenizer, template, special, config), plain_encoder(tokenizer, special)


def with_gaps(encoder, ids):
    """The text of ids with a # for each mask."""
    mask, decode = encoder.special.mask, encoder.tokenizer.decode
    return "".join("#" if i == mask else decode([i], skip_special=False) for i in ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json", "no mask in it"])
@pytest.mark.parametrize("parts", [["5 + ", 2, " = 12,\n ok", 1], [3, "a"], ["Zoe keeps 9", 1, 2, " keys"]])
def test_the_ids_around_spans_are_those_of_the_text(pieces, tokenizer_folder, kind, parts):
    tokenizer = pieces if kind == "sentencepiece" else load_tokenizer(tokenizer_folder())
    chat, plain = encoders_with_spans(tokenizer, without_mask=kind == "no mask in it")
    text = "".join(p if isinstance(p, str) else "#" * p for p in parts)
    lengths, end = [p for p in parts if isinstance(p, int)], "" if isinstance(parts[-1], int) else "<|eot_id|>"
    for prompt in (None, "How many?", CONVERSATION):
        found = encode_spans(chat, plain, MarkedText(parts, prompt), "x")
        begin = [] if prompt is None else chat.prompt(prompt)  # as for decode
        assert found.ids[: len(begin)] == begin and found.prompt_len == len(begin)
        # After a last span the end is open.
        expected = text if prompt is None else text + end
        assert with_gaps(plain if prompt is None else chat, found.ids[len(begin) :]) == expected
        assert [end - first for first, end in found.spans] == lengths
        masked = [at for first, end in found.spans for at in range(first, end)]
        assert masked == [at for at, i in enumerate(found.ids) if i == chat.special.mask] and found.first == masked[0]
    # Spans filled with a text of as many tokens come out as that text, special tokens left out.
    word, ids = tokenizer.encode(" keys"), list(found.ids)
    for first, end in found.spans:
        ids[first:end] = (word + [chat.special.eos] * (end - first))[: end - first]
    fills = fills_of(tokenizer, ids, found.spans)
    assert all(" keys".startswith(fill) and fill for fill in fills)
    assert filled_text(parts, fills) == tokenizer.decode(ids[len(begin) :])


@pytest.mark.parametrize(
    "parts, prompt, message",
    [
        (["a <|eot_id|>", 2], None, r"special token '<\|eot_id\|>'"),
        (["a <|mdm_mask|>", 2], "How many?", r"special token '<\|mdm_mask\|>'"),
        (["a", 2], "<|eot_id|>", "special token"),
        (["\ud800", 2], None, "half of a surrogate pair"),
        (["a", 2], "\ud800", "the text holds half of a surrogate pair"),
        (["a", 2], " \n", "the text is empty"),
    ],
)
def test_special_tokens_in_texts_with_spans_are_refused(pieces, parts, prompt, message):
    with pytest.raises(UserError, match=message):
        encode_spans(*encoders_with_spans(pieces), MarkedText(parts, prompt), "x")


def test_plain_texts_begin_as_the_tokenizer_says(tokenizer_folder):
    settings = tokenizer_folder() / "tokenizer_config.json"
    for begins in (False, True):
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": begins}))
        chat, plain = encoders_with_spans(load_tokenizer(settings.parent))
        found = encode_spans(chat, plain, MarkedText(["a", 1], None), "x")
        assert with_gaps(plain, found.ids) == "<|startoftext|>" * begins + "a#"
    assert plain.tokenizer.decode(plain.prompt(CONVERSATION)) == "a\n\n b\nc"

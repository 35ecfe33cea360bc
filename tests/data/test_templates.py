"""Templates, the boundary between prompt and response in tokens, and texts that would become control tokens."""

import io
from collections.abc import Callable

import pytest
import sentencepiece
import tokenizers

from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Example
from jaxblock.data.tokens import bounded_jinja
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.find_special import find_special
from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.data.tokens.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from jaxblock.data.tokens.special import SpecialIds
from jaxblock.data.tokens.templates import NAMED, Template, template_source
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.data.tokens.tokenizer_json import HuggingFaceTokenizer
from jaxblock.errors import UserError


def example(prompt: str = "How many?", response: str = "5 + 7 = 12\n#### 12") -> Example:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
    return Example(messages, prompt, response, "some.jsonl:3", "some.jsonl:3", "some.jsonl:3")


def encoder_of(tokenizer: Tokenizer, source: str, **settings: str) -> Encoder:
    config = DataConfig(**settings)
    template, ids = find_special(tokenizer, "mine", source, config, {})
    return Encoder(tokenizer, template, ids, config)


def shown(encoder: Encoder, of: Example) -> tuple[str, ...]:
    """Returns the prompt and the response that an example becomes."""
    return tuple(encoder.tokenizer.decode(ids, skip_special=False) for ids in encoder.prompt_and_response(of))


def turn(role: str) -> str:
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
    assert shown(encoder, example(response=" 5 + 7 = 12\n#### 12 \n")) == (prompt, "5 + 7 = 12\n#### 12<|eot_id|>")
    assert encoder.tokenizer.decode(encoder.prompt("How many?"), skip_special=False) == prompt
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "How many?"}]
    told = encoder.tokenizer.decode(encoder.prompt(own), skip_special=False)
    assert system is None or told == prompt.replace("brief", "long")  # a record's own system message wins


def test_turns_before_the_last_are_prompt(pieces):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    assert shown(encoder_of(pieces, template_source("plain")), Example(messages, "", "", "x:1", "x:1", "x:1")) == (
        "Question: a\nAnswer:<|eot_id|>b<|eot_id|>Question: c\nAnswer:<|eot_id|>",
        "d<|eot_id|>",
    )


def test_the_header_that_lladas_template_always_appends_is_dropped(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder())
    source = template_source("tokenizer", tokenizer_template=tokenizer.settings["chat_template"])
    theirs, ours = encoder_of(tokenizer, source), encoder_of(tokenizer, template_source("chat"))
    assert theirs.template.render(example().messages, False).endswith(turn("assistant"))
    assert theirs.prompt_and_response(example()) == ours.prompt_and_response(example())


def test_a_newline_after_the_terminator_is_dropped(pieces):
    source = "{% for m in messages %}{{ m.role + '\\n' + m.content + eot_token + '\\n' }}{% endfor %}"
    source += "{{ 'assistant\\n' if add_generation_prompt }}"
    assert shown(encoder_of(pieces, source), example("q", "a")) == ("user\nq<|eot_id|>\nassistant\n", "a<|eot_id|>")


FIRST, TURNS = "{{ messages[0].content }}", "{% for m in messages %}{{ m.content }}{{ eot_token }}{% endfor %}"
ALONE = r"changes the prompt's tokens: token 7 is '.1' \(id \d+\) in the prompt alone and '.12' \(id \d+\) once"
MASK = "{{ '<|mdm_mask|>' }}"


@pytest.mark.parametrize(
    "source, complaint",
    [
        # no boundary: the prompt's "1" and the response's "2" become one token
        (FIRST + "{% if messages[1] %}{{ messages[1].content }}{{ eot_token }}{% endif %}", ALONE),
        ("{{ bos_token if add_generation_prompt }}" + TURNS, r"the prompt's tokens: token 0 is '<\|startoftext\|>'"),
        (FIRST + "{{ eot_token }}{{ messages[1].content if messages[1] }}", "does not end the response"),
        (FIRST + "{{ eot_token }}{{ eot_token if messages[1] }}", "leaves nothing of the response"),
        (TURNS + "{{ 'Bye' if messages[1] }}", "writes more after the response's end: 'Bye'"),
        (MASK + TURNS, "the prompt's tokens contain the mask token"),
        (TURNS.replace("{{ m", "{{ '<|mdm_mask|>' if loop.index0 }}{{ m"), "the response's tokens contain the mask"),
        ("{{ raise_exception('no such role') }}", "template 'mine' fails on it: no such role"),
        ("{{ messages[0].content + 1 }}", "template 'mine' fails on it"),
        ("{{ messages.__class__.__mro__ }}", "template 'mine' fails on it: .*unsafe"),
        ("{% for m in messages %}\n{{ m.content }}", "template 'mine', line 2"),
    ],
)
def test_bad_templates(pieces, source, complaint):
    tokenizer = train_tokenizer(["1234 12 34 1"] * 50, DataConfig(vocab_size=400)) if complaint == ALONE else pieces
    with pytest.raises(UserError, match=complaint) as caught:
        encoder_of(tokenizer, source).prompt_and_response(example("What is 1", "234"))
    assert "some.jsonl:3" in str(caught.value) or "line 2" in complaint


@pytest.mark.parametrize("token", ["<|mdm_mask|>", "<|eot_id|>", "<|endoftext|>", "<|start_header_id|>"])
def test_special_tokens_in_a_records_text_are_refused(pieces, token):
    encoder = encoder_of(pieces, template_source("chat"))
    for side, role in {"prompt": "user", "response": "assistant"}.items():
        with pytest.raises(UserError) as caught:
            encoder.prompt_and_response(example(**{side: f"take {token} out"}))
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
    messages = [{"role": "user", "content": "a “quoted” <b> a"}, {"role": "assistant", "content": "b\n"}]
    for ask in (False, True):
        options = {"chat_template": source, "add_generation_prompt": ask, "bos_token": "<s>"}
        expected, _ = theirs.render_jinja_template([messages], **options)
        assert Template("mine", source, {"bos_token": "<s>"}).render(messages, ask) == expected[0]


DOUBLING = "{% set s = namespace(v='aaaa') %}{% for i in range(60) %}{% set s.v = s.v OP s.v %}{% endfor %}"


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
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "more than 1,000 rounds",
        ),
        ("{{" + "(" * 20_000 + "1" + ")" * 20_000 + "}}", "recursion"),
        ("{{ lipsum(n=10**6) }}", "'lipsum' is undefined"),
        *(
            (source, "too large")
            for source in (
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
            )
        ),
    ],
)
def test_what_a_template_cannot_do_is_said(source, complaint, monkeypatch):
    monkeypatch.setattr(bounded_jinja, "MOST_ROUNDS", 1000)
    with pytest.raises(UserError, match=f"template 'mine'.*{complaint}") as caught:
        Template("mine", source).render([{"role": "user", "content": "q"}], True, where="a.jsonl:1")
    assert str(caught.value).startswith("a.jsonl:1: ") or "line 1" in complaint


def test_finding_templates(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ bos_token }}<|im_start|> <|im_start|>")
    assert Template("mine", template_source(str(path))).control_tokens() == ("<|im_start|>",)
    assert template_source("tokenizer", tokenizer_template=[{"name": "default", "template": "x"}]) == "x"
    path.write_bytes(b"\xff")
    for name, complaint in [
        ("chatt", "neither one of chat, plain, tokenizer nor a file"),
        ("tokenizer", "no chat"),
        (str(path), "not UTF-8"),
    ]:
        with pytest.raises(UserError, match=complaint):
            template_source(name)
    for brought in ([5], [None], [{"name": []}], [{"name": "default", "template": 5}], {}, 5):
        with pytest.raises(UserError, match="the tokenizer came with no chat template"):
            template_source("tokenizer", tokenizer_template=brought)


SPECIAL = ("<|mask|>", "<|eos|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
EDITING = NAMED["chat"].replace("message['content'] | trim", "message['content'] | replace('*', '')")
HARMLESS = "Is 2*3 < 7 or >, ﬁne | so? ４２ <eot_id|> Ünïcode 你好"
NORMALISERS = tokenizers.normalizers


def sentencepiece_with(normalisation: str) -> Tokenizer:
    model, texts = io.BytesIO(), ["user assistant system said some words and numbers 0123456789 <|>_"] * 20
    options = {"model_type": "char", "vocab_size": 400, "hard_vocab_limit": False, "byte_fallback": True}
    options |= {"user_defined_symbols": [*SPECIAL, "\n"], "normalization_rule_name": normalisation}
    options |= {"add_dummy_prefix": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **options)
    return SentencePieceTokenizer({"tokenizer.model": model.getvalue()}, "test")


def tokenizer_json_with(normaliser: NORMALISERS.Normalizer) -> Tokenizer:
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    built = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    built.normalizer, built.pre_tokenizer = normaliser, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens([tokenizers.AddedToken(text, normalized=True) for text in SPECIAL])
    return HuggingFaceTokenizer({"tokenizer.json": built.to_str().encode(), "tokenizer_config.json": b"{}"}, "test")


def plain_encoder(tokenizer: Tokenizer, source: str = NAMED["chat"], system: str | None = None) -> Encoder:
    ids = [tokenizer.id_of(text) for text in SPECIAL[:3]]
    template = Template("mine", source, {"bos_token": "", "eos_token": SPECIAL[1], "eot_token": SPECIAL[2]})
    return Encoder(tokenizer, template, SpecialIds(*ids, pad=ids[1]), DataConfig(system=system))


CASES: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "full-width brackets, SentencePiece": (lambda: sentencepiece_with("nmt_nfkc"), "x＜|eot_id|＞ y"),
    "control letter, SentencePiece": (lambda: sentencepiece_with("nmt_nfkc"), "<|start_header\x07_id|>"),
    "full-width letters": (lambda: tokenizer_json_with(NORMALISERS.NFKC()), "<|ｅot_id|>"),
    "capitals": (lambda: tokenizer_json_with(NORMALISERS.Lowercase()), "<|EOT_id|>"),
    "invisible letter": (lambda: tokenizer_json_with(NORMALISERS.Replace("\u200b", "")), "<|m\u200bask|>"),
    "accents": (lambda: tokenizer_json_with(NORMALISERS.BertNormalizer(lowercase=True)), "<|éos|>"),
    "a template that edits texts": (lambda: tokenizer_json_with(NORMALISERS.NFC()), "<|eot*_id|>"),
}


@pytest.mark.parametrize("case", CASES)
def test_text_that_becomes_a_control_token_is_refused_with_its_place(case):
    make, text = CASES[case]
    source = EDITING if "edits" in case else NAMED["chat"]
    encodes = plain_encoder(make(), source)
    refusal = r"^in\.jsonl:7: the \w+'s text ch\w+ the control tokens: .*control token \d"
    for turns in (
        [("user", f"a {text} b")],
        [("user", "a"), ("assistant", f"b {text}"), ("user", "c")],
        [("system", text), ("user", "a")],
    ):
        with pytest.raises(UserError, match=refusal):
            encodes.prompt([{"role": role, "content": content} for role, content in turns], where="in.jsonl:7")
    with pytest.raises(UserError, match=r"the system's text changes the control tokens"):
        plain_encoder(encodes.tokenizer, source, system=text).prompt("a", where="in.jsonl:7")
    assert encodes.prompt(HARMLESS) != encodes.prompt("other")


def test_a_prompt_that_would_show_the_model_nothing_is_refused():
    only_system = "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    for source, prompt, message in [
        ("{{ '<|start_header_id|>' }}", "a", "leaves out the user's text"),
        (only_system, "a", "leaves out the user's text"),
        (NAMED["chat"], " \n", "the text is empty"),
        (NAMED["chat"], "\ud800", "half of a surrogate pair"),
    ]:
        with pytest.raises(UserError, match=message):
            plain_encoder(tokenizer_json_with(NORMALISERS.NFC()), source).prompt(prompt)

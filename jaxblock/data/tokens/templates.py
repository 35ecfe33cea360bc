"""Renders chat templates, which convert messages into the text that is tokenised, with Jinja in a sandbox.

Templates can use what Hugging Face's renderer offers: `messages`, `add_generation_prompt`, `tools` and `documents` (both
None), the special tokens by name, `raise_exception`, `strftime_now`, `tojson`, loop controls and `{% generation %}`.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jaxblock.data.text.messages import Message
from jaxblock.data.tokens.bounded_jinja import BoundedEnvironment
from jaxblock.errors import UserError, first_line
from jaxblock.io.files import read_bytes
from jaxblock.io.paths import as_path

# LLaDA's layout, written after the template of its tokenizer: every turn has a header and an end.
_CHAT = """\
{{ bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + eot_token }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# The end-of-turn token after the question comes right before the answer, so that no token spans question and answer.
_PLAIN = """\
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- message['content'] | trim + '\\n\\n' }}
{%- elif message['role'] == 'user' %}
{{- 'Question: ' + message['content'] | trim + '\\nAnswer:' + eot_token }}
{%- else %}
{{- message['content'] | trim + eot_token }}
{%- endif %}
{%- endfor %}
"""

NAMED = {"chat": _CHAT, "plain": _PLAIN}

_CONTROL = re.compile(r"<\|[^<>|\s]+\|>")
_ERRORS_OF_EXPRESSIONS = (
    TypeError, ValueError, LookupError, RecursionError, AttributeError, ArithmeticError, OSError, MemoryError,
    AssertionError,
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """Holds a chat template and the texts of the special tokens that it may write.

    Attributes:
        name: The template's name, as the config gives it.
        source: The template's Jinja text.
        tokens: The values of the template's variables for special tokens: `bos_token`, `eos_token`, `eot_token` and others
            that the tokenizer names.
    """

    name: str
    source: str
    tokens: Mapping[str, Any] = field(default_factory=dict)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, *, where: str = "") -> str:
        """Renders a conversation as text.

        Args:
            messages: The turns of the conversation.
            add_generation_prompt: Whether the text ends with the header of an assistant's turn (a template may write the
                header in any case).
            where: The record that error messages name, as in "train.jsonl:17".

        Raises:
            UserError: If the template does not compile, fails, or rejects the messages.
        """
        try:
            return _compiled(self.source).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.tokens,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"template {self.name!r}, line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, *_ERRORS_OF_EXPRESSIONS) as error:
            raise UserError(
                f"{where or 'a conversation'}: template {self.name!r} fails on it: {first_line(error)}"
            ) from error

    def control_tokens(self) -> tuple[str, ...]:
        """Returns the texts like <|name|> in the template's source; a tokenizer trained here makes each of them one token."""
        return tuple(dict.fromkeys(_CONTROL.findall(self.source)))


def template_source(name: str, *, tokenizer_template: Any = None) -> str:
    """Returns the Jinja source of a template.

    Args:
        name: `chat`, `plain`, `tokenizer` (the template that came with the tokenizer), or the path of a Jinja file.
        tokenizer_template: The template that came with the tokenizer, or a list of named templates, of which the one
            called "default" is used; None where none came with it.

    Raises:
        UserError: If there is no template of that name.
    """
    if name in NAMED:
        return NAMED[name]
    if name == "tokenizer":
        if isinstance(tokenizer_template, list):
            entries = [
                entry for entry in tokenizer_template if isinstance(entry, dict) and entry.get("name") == "default"
            ]
            tokenizer_template = entries[-1].get("template") if entries else None
        if not isinstance(tokenizer_template, str):
            raise UserError(
                "data.template = 'tokenizer': the tokenizer came with no chat template (chat_template in "
                "tokenizer_config.json, or chat_template.jinja); set data.template to chat, plain or a Jinja file"
            )
        return tokenizer_template
    if not as_path(name).exists():
        known = ", ".join([*NAMED, "tokenizer"])
        raise UserError(f"data.template: {name!r} is neither one of {known} nor a file")
    try:
        return read_bytes(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data.template: {name} is not UTF-8 at byte {error.start}") from error


class _Generation(jinja2.ext.Extension):
    """Renders the body of `{% generation %}`, which marks the assistant's words for the loss masks of other trainers."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parses the tag's body, which has a variable scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Returns a value as JSON without the HTML escapes that Jinja's own filter adds."""
    separators = separators and tuple(separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_FIRST_CALL: list[datetime.datetime] = []


def clock(moment: datetime.datetime | None = None) -> datetime.datetime:
    """Returns the time of the first call, so that a prompt and its whole conversation show the same date.

    Args:
        moment: The time to return from now on, where this is the first call: that of another process.
    """
    if not _FIRST_CALL:
        _FIRST_CALL.append(moment or datetime.datetime.now())
    return _FIRST_CALL[0]


@functools.cache
def _compiled(source: str) -> jinja2.Template:
    # A check of every operation doubles the time of rendering, and ours need none.
    kind = jinja2.sandbox.ImmutableSandboxedEnvironment if source in NAMED.values() else BoundedEnvironment
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.filters["tojson"] = _to_json
    # Templates of Hugging Face models call the first to refuse unknown roles, and the second to write today's date.
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: clock().strftime(form)
    return environment.from_string(source)

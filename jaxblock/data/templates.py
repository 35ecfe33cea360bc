"""Chat templates: messages -> the text that is tokenised. Jinja, sandboxed, as in Hugging Face tokenizers."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.sandbox

from jaxblock import storage
from jaxblock.errors import UserError

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": ...}"""

# LLaDA's layout, after its own tokenizer's template: every turn has a header and an end.
_CHAT = """\
{{ bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + eot_token }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# The question's own end of turn stands right before the answer: no token can reach across that boundary.
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


@dataclass(frozen=True)
class Template:
    """A chat template and the token texts it may use.

    Attributes:
        name: As the config gives it.
        source: The Jinja text.
        tokens: Its variables `bos_token`, `eos_token` and `eot_token`.
    """

    name: str
    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, *, where: str = "") -> str:
        """The conversation as text.

        Args:
            messages: Its turns.
            add_generation_prompt: End with what comes before an assistant's words (a template may do so in any case).
            where: What to name in an error, as in "train.jsonl:17".

        Raises:
            UserError: If the template does not compile, fails, or rejects the messages.
        """
        try:
            return _compiled(self.source).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self.tokens
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"template {self.name!r}, line {error.lineno}: {error.message}") from error
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ArithmeticError,
            OSError,
        ) as error:
            raise UserError(f"{where or 'a conversation'}: template {self.name!r} fails on it: {error}") from error

    def control_tokens(self) -> tuple[str, ...]:
        """Texts like <|name|> that the template itself writes; each must be one token of a trained tokenizer."""
        return tuple(dict.fromkeys(_CONTROL.findall(self.source)))


def find(name: str, *, tokenizer_template: Any = None) -> str:
    """The Jinja source of a template.

    Args:
        name: `chat`, `plain`, `tokenizer` (the tokenizer folder's own), or the path of a Jinja file.
        tokenizer_template: The chat template that came with the tokenizer, if any.

    Raises:
        UserError: If there is none of that name.
    """
    if name in NAMED:
        return NAMED[name]
    if name == "tokenizer":
        if isinstance(tokenizer_template, list):  # several, by name
            tokenizer_template = {entry.get("name"): entry.get("template") for entry in tokenizer_template}.get(
                "default"
            )
        if not isinstance(tokenizer_template, str):
            raise UserError(
                "data.template = 'tokenizer': the tokenizer came with no chat template (chat_template in "
                "tokenizer_config.json, "
                "or chat_template.jinja); set data.template to chat, plain or a Jinja file"
            )
        return tokenizer_template
    if not storage.as_path(name).exists():
        known = ", ".join([*NAMED, "tokenizer"])
        raise UserError(f"data.template: {name!r} is neither one of {known} nor a file")
    try:
        return storage.read_bytes(os.fspath(name)).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"data.template: {name} is not UTF-8 at byte {error.start}") from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.cache
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = (
        _refuse  # templates of Hugging Face models call it on roles they do not know
    )
    return environment.from_string(source)

"""Converts texts with spans to fill into ids, in which every span is masks, and finds the text that a filled span has become."""

from __future__ import annotations

from collections.abc import Sequence

from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Example
from jaxblock.data.text.marked import MarkedText, Parts, SpannedText
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.special import SpecialIds, first_stop
from jaxblock.data.tokens.templates import Template
from jaxblock.data.tokens.tokenizer import Tokenizer, token_text
from jaxblock.errors import UserError

_HARMLESS = "…"  # stands for a span where a text is checked: no tokenizer or template has a special meaning for it

# Writes texts as they are, each on a line of its own; after the token for the beginning where the tokenizer's settings ask for it.
_AS_WRITTEN = """\
{{- bos_token if add_bos_token else '' }}
{%- for message in messages %}
{{- message['content'] + ('' if loop.last else '\\n') }}
{%- endfor %}
"""


def plain_encoder(tokenizer: Tokenizer, special: SpecialIds) -> Encoder:
    """Makes the encoder of texts that no chat template is applied to.

    They begin with the tokenizer's `bos_token` where its settings set `add_bos_token`, as in transformers. Special tokens in a text
    are refused, as with a template.
    """
    bos = token_text(tokenizer.settings.get("bos_token"))
    begins = tokenizer.settings.get("add_bos_token") is True and bos is not None
    template = Template("no template", _AS_WRITTEN, {"bos_token": bos or "", "add_bos_token": begins})
    return Encoder(tokenizer, template, special, DataConfig())


def encode_spans(encoder: Encoder, plain: Encoder, text: MarkedText, where: str) -> SpannedText:
    """Converts a text with spans into ids.

    A text that answers a prompt is laid out as the chat template lays out an answer. It ends with the end of the turn where
    something is given after the last span; else its end is open. A text that stands alone is taken as it is.

    Args:
        encoder: the encoder with the chat template, for a text with a prompt.
        plain: the encoder of ``plain_encoder``, for a text that stands alone.
        text: the text's pieces and its prompt.
        where: the text's name in messages.

    Raises:
        UserError: a text holds or becomes a special token, or the template or the tokenizer changes what is around a span.
    """
    checked = "".join(part if isinstance(part, str) else _HARMLESS for part in text.parts)
    if text.prompt is None:
        used, before, start = plain, [], 0
        plain.prompt([{"role": "user", "content": checked}], where=where)
    else:
        used, before = encoder, encoder.conversation(text.prompt, where=where)
        messages = (*before, {"role": "assistant", "content": checked})
        start = len(encoder.prompt_and_response(Example(messages, "", checked, where, where, where))[0])
    mark = _separator(used)
    marked = "".join(part if isinstance(part, str) else used.tokenizer.piece(mark) for part in text.parts)
    role = "user" if text.prompt is None else "assistant"
    ids = used.tokenizer.encode(used.template.render([*before, {"role": role, "content": marked}], False, where=where))
    return _with_masks(used.special, text, ids, start, mark, where)


def _separator(encoder: Encoder) -> int:
    """Returns a special token that the tokenizer finds in a text without changing what is beside it: the mask where it can be."""
    tokenizer, special = encoder.tokenizer, encoder.special
    for mark in (special.mask, special.eot, special.eos):
        if mark >= tokenizer.vocab_size:
            continue
        piece = tokenizer.piece(mark)
        alone = [tokenizer.encode(text) for text in (f"a{piece}a", f"a {piece}a", f"a{piece} a")]
        if all(ids.count(mark) == 1 for ids in alone) and len({tuple(ids) for ids in alone}) == 3:
            return mark
    raise UserError(
        "infilling needs a special token that the tokenizer finds in a text, and its mask, end of turn and end of sequence are "
        "none: use the tokenizer files of the checkpoint"
    )


def _with_masks(
    special: SpecialIds, text: MarkedText, ids: Sequence[int], start: int, mark: int, where: str
) -> SpannedText:
    """Replaces each mark by the masks of its span, and ends the text after its last span or with the end of the turn."""
    lengths = [part for part in text.parts if isinstance(part, int)]
    marks = [at for at in range(start, len(ids)) if ids[at] == mark][: len(lengths)]
    if len(marks) < len(lengths):
        raise UserError(f"{where}: template or tokenizer drops a span: give what is around it in another way")
    found, spans, done = list[int](), list[tuple[int, int]](), 0
    for at, length in zip(marks, lengths, strict=True):
        found += ids[done:at]
        spans.append((len(found), len(found) + length))
        found += [special.mask] * length
        done = at + 1
    rest = list(ids[done:])
    if text.prompt is not None:
        end = first_stop(rest, special.stop_ids)
        rest = rest[: 0 if isinstance(text.parts[-1], int) or end is None else end + 1]
    return SpannedText(text.parts, found + rest, spans, start)


def fills_of(tokenizer: Tokenizer, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[str]:
    """Returns the text of each filled span, with the spaces that it has after the text before it.

    Args:
        tokenizer: the tokenizer.
        ids: the ids of the whole text, its spans filled.
        spans: the [first, end) of each span.
    """
    texts = []
    for first, end in spans:
        before, upto = tokenizer.decode(ids[:first]), tokenizer.decode(ids[:end])
        texts.append(upto[len(before) :] if upto.startswith(before) else tokenizer.decode(ids[first:end]))
    return texts


def filled_text(parts: Parts, fills: Sequence[str]) -> str:
    """Returns the text of pieces with each span replaced by what it was filled with."""
    left = iter(fills)
    return "".join(part if isinstance(part, str) else next(left) for part in parts)

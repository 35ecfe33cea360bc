"""Checks that a checkpoint and prepared data turn text into the same ids: the same tokenizer, special ids and chat template."""

from __future__ import annotations

from typing import NamedTuple

from jaxblock.data.store.prepared_folder import Prepared
from jaxblock.data.text.messages import Message
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.templates import Template
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.errors import UserError

_TURNS: tuple[Message, ...] = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " 1 + 2?\n"},
    {"role": "assistant", "content": " 3 \n"},
    {"role": "user", "content": "Why\n\nso?"},
    {"role": "assistant", "content": "Counting."},
)
_CONVERSATIONS = [list(_TURNS[begin:end]) for begin in (0, 1) for end in (2, 3, 4, 5)]
"""The conversations that two templates are compared on: with and without a system message, one turn and several."""

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class CheckpointText(NamedTuple):
    """Holds what a checkpoint's folder tells about text.

    Attributes:
        folder: the checkpoint's name in messages.
        tokenizer: its tokenizer.
        encoder: the tokenizer with the chat template and the special ids; None where the checkpoint has no template, or, as
            an autoregressive one, no mask token yet.
        recorded: whether all this is what the checkpoint was trained with, and not what its files suggest.
    """

    folder: str
    tokenizer: Tokenizer
    encoder: Encoder | None
    recorded: bool


def check_same_text(text: CheckpointText, prepared: Prepared, *, allow_other_template: bool) -> None:
    """Checks that prepared data are made of the tokens that a checkpoint was trained with.

    Args:
        text: what the checkpoint's folder tells about text.
        prepared: the prepared data.
        allow_other_template: whether the chat templates, and with them the tokens that end a response, may differ.

    Raises:
        UserError: tokenizer, special ids or template differ; the message names both folders, and what each has.
    """
    _check_tokenizer(text, prepared)
    if text.encoder is None:
        return
    both = f"{text.folder} and {prepared.folder} have different"
    prepare = f"prepare the data with the checkpoint's own (data.tokenizer: {text.folder})"
    ours, theirs = prepared.special, text.encoder.special
    for name, a, b in (("mask", theirs.mask, ours.mask), ("end-of-sequence", theirs.eos, ours.eos)):
        if a != b:
            raise UserError(f"{both} {name} tokens ({a} and {b}): {prepare}")
    if allow_other_template:
        return
    allow = "or set data.allow_other_template to pair them all the same"
    if not _same_template(text.encoder.template, prepared.encoder.template, text.recorded):
        names = f"{text.encoder.template.name!r} and {prepared.encoder.template.name!r}, which write a conversation differently"
        raise UserError(
            f"{both} chat templates ({names}): prepare the data with the checkpoint's (data.template), {allow}"
        )
    known = text.recorded and None not in (theirs.ends, ours.ends)
    if text.recorded and theirs.eot != ours.eot or known and set(theirs.stop_ids) != set(ours.stop_ids):
        ends = f"{sorted(theirs.stop_ids)} and {sorted(ours.stop_ids)}"
        raise UserError(f"{both} tokens that end a response ({ends}): {prepare}, {allow}")


def _check_tokenizer(text: CheckpointText, prepared: Prepared) -> None:
    """Raises UserError where the tokenizers differ in more than the mask token of an autoregressive start."""
    theirs, ours = text.tokenizer, prepared.tokenizer
    if _same_tokenizer(theirs, ours, None if text.encoder is not None else prepared.special.mask):
        return
    a, b = (
        f"{tokenizer.vocab_size} tokens, {name} with SHA-256 {sha256[:12]}"
        for tokenizer in (theirs, ours)
        for name, sha256 in [tokenizer.main_file()]
    )
    but = " and other added tokens" if a == b else ""
    raise UserError(
        f"{text.folder} and {prepared.folder} have different tokenizers ({a}; {b}{but}): prepare the data with the "
        f"checkpoint's own (data.tokenizer: {text.folder})"
    )


def _same_tokenizer(theirs: Tokenizer, ours: Tokenizer, mask: int | None) -> bool:
    """Tells whether two tokenizers give the same ids; the second may have the token ``mask`` in addition.

    A SentencePiece model that was converted to a tokenizer.json, which another library does, is compared by its tokens.
    """
    if all(theirs.files.get(name) == ours.files.get(name) for name in _FILES):
        return True
    if type(theirs) is not type(ours):
        count = min(theirs.vocab_size, ours.vocab_size)
        return all(theirs.piece(i) == ours.piece(i) for i in range(count))
    a, b = theirs.definition(), ours.definition()
    if mask is not None and mask >= theirs.vocab_size:
        b = {**b, "added_tokens": [token for token in b.get("added_tokens", []) if token["id"] != mask]}
    return a == b


def _same_template(theirs: Template, ours: Template, recorded: bool) -> bool:
    """Tells whether two templates write every one of a few conversations alike.

    Args:
        theirs: the checkpoint's template.
        ours: the template of the data.
        recorded: whether the checkpoint records what its template wrote for `eot_token` and the like; where it does not, its
            text alone decides.
    """
    if theirs.source == ours.source and (theirs.tokens == ours.tokens or not recorded):
        return True
    written = _written(theirs)
    return written == _written(ours) and any(written)


def _written(template: Template) -> list[str | None]:
    """Returns what a template writes, with and without the header of the next turn; None where it refuses a conversation."""
    written: list[str | None] = []
    for turns in _CONVERSATIONS:
        for prompt in (False, True):
            try:
                written.append(template.render(turns, prompt))
            except UserError:
                written.append(None)
    return written

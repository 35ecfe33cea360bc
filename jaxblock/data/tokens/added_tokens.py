"""Finds the tokens that a checkpoint's settings add to a tokenizer's own vocabulary, as ``transformers`` does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

from jaxblock.data.tokens.tokenizer import token_text
from jaxblock.errors import UserError

_LISTED = ("additional_special_tokens", "extra_special_tokens")
# Where a vocabulary lacks one of these it is not added, because its id would be a row that the embedding lacks: an end or a mask
# is then asked for by the settings that need it, and the others are in no text that a template writes.
_OTHERS = ("eos_token", "mask_token", "unk_token", "sep_token", "pad_token", "cls_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Declared = list[tuple[int | None, tokenizers.AddedToken]]
"""Added tokens with their ids; None where the settings give none."""


def declared_tokens(files: Mapping[str, bytes], where: str) -> Declared:
    """Reads the tokens that tokenizer_config.json, or the older special_tokens_map.json and added_tokens.json, declare.

    Args:
        files: the contents of the tokenizer's files by name.
        where: the place that an error names.

    Returns:
        The tokens with an id in its order, then those that are only named; each text once.

    Raises:
        UserError: a file does not declare tokens in the way that transformers reads.
    """
    try:
        settings, numbered = _read(files)
        listed = [token for name in _LISTED for token in _several(settings.get(name))]
        named = [settings.get("bos_token"), *listed]
        special = {token_text(token) for token in [*named, *map(settings.get, _OTHERS)]}
        found: dict[str, tuple[int | None, tokenizers.AddedToken]] = {
            text: (token_id, _token(token, text, text in special))
            for token_id, token in sorted(numbered.items())
            if (text := token_text(token))
        }
        found |= {
            text: (None, _token(token, text, True))
            for token in named
            if (text := token_text(token)) and text not in found
        }
        return list(found.values())
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{where}: added_tokens_decoder, additional_special_tokens, special_tokens_map.json or added_tokens.json "
            f"cannot be read ({error})"
        ) from error


def _read(files: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[int, Any]]:
    """Returns (the settings that name special tokens, the added tokens by id)."""
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    if "added_tokens_decoder" in settings:
        return settings, {int(i): token for i, token in settings["added_tokens_decoder"].items()}
    # The older layout: two more files.
    settings = {**settings, **json.loads(files.get("special_tokens_map.json", b"{}"))}
    older = json.loads(files.get("added_tokens.json", b"{}"))
    return settings, {int(i): text for text, i in older.items()}


def _several(value: Any) -> Iterable[Any]:
    """Returns the tokens of a list, or of an object from names to tokens."""
    return value.values() if isinstance(value, dict) else value or ()


def _token(token: Any, text: str, special: bool) -> tokenizers.AddedToken:
    """Makes an added token of a text, or of an object with the fields of one."""
    flags = {name: bool(token[name]) for name in _FLAGS if name in token} if isinstance(token, dict) else {}
    special = special or flags.get("special", False)
    return tokenizers.AddedToken(text, **{"normalized": not special, **flags, "special": special})


def add_declared(tokenizer: tokenizers.Tokenizer, declared: Declared, where: str) -> None:
    """Adds declared tokens to a tokenizer that lacks them, or has them with other flags.

    Raises:
        UserError: a new token would get another id than the one that the settings give it.
    """
    held = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    for token_id, token in declared:
        if repr(token) in held:
            continue
        new = tokenizer.token_to_id(token.content) is None
        tokenizer.add_tokens([token])
        given = tokenizer.token_to_id(token.content)
        if new and token_id not in (None, given):
            raise UserError(
                f"{where}: the settings give the added token {token.content!r} the id {token_id}, but after this vocabulary it "
                f"would be {given}: the files do not belong together"
            )

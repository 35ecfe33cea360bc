"""Finds which ids a tokenizer and its checkpoint use for the mask, the end of a sequence and the end of a turn."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxblock.data.config import DataConfig
from jaxblock.data.tokens.special import SpecialIds, special_from_json
from jaxblock.data.tokens.templates import Template
from jaxblock.data.tokens.tokenizer import BOS, EOS, EOT, MASK, Tokenizer, token_text
from jaxblock.data.tokens.tokenizer_json import HuggingFaceTokenizer
from jaxblock.errors import UserError
from jaxblock.io.files import read_json
from jaxblock.io.hub import local_checkpoint
from jaxblock.io.paths import PathLike, as_path

TURN_ENDS = (EOT, "<|im_end|>")
"""The end-of-turn tokens of the model families; config.json gives only the end of the sequence."""

_MASKS = (MASK, "<|mask|>", "<|MASK|>", "[MASK]", "<mask>")
_ENDS = (EOS, "<|end_of_text|>", "</s>")
_UNUSED = re.compile(r"mask|reserved|unused|extra|placeholder|dummy", re.IGNORECASE)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Stands for the assistant's words in a rendered conversation: a text that no template contains, trims or escapes.
_PROBE = "Zq7Probe"


def ids_in_checkpoint(path: PathLike) -> dict[str, int]:
    """Reads the special ids that the config.json beside a tokenizer gives.

    Args:
        path: The tokenizer's folder, file or hub name.

    Returns:
        {"mask": id, "eos": id}; an id that config.json does not give is left out. Where it lists several end-of-sequence
        ids, "eos" is the first.

    Raises:
        UserError: If there is a config.json that is not a JSON object.
    """
    content = _read_beside(path, "config.json")
    found = {}
    for name in ("mask", "eos"):
        value = content.get(f"{name}_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int) and not isinstance(first, bool) and first >= 0:
            found[name] = first
    return found


def ends_in_checkpoint(path: PathLike) -> tuple[int, ...]:
    """Reads all ids that end a response, as config.json and generation_config.json beside a tokenizer list them.

    Args:
        path: The tokenizer's folder, file or hub name.

    Raises:
        UserError: If one of the files is there and is not a JSON object.
    """
    listed: list[Any] = []
    for name in ("config.json", "generation_config.json"):
        ends = _read_beside(path, name).get("eos_token_id")
        listed += ends if isinstance(ends, list) else [ends]
    return tuple(dict.fromkeys(i for i in listed if isinstance(i, int) and not isinstance(i, bool) and i >= 0))


def _read_beside(path: PathLike, name: str) -> dict[str, Any]:
    """Reads a JSON file beside a tokenizer; returns {} where there is none.

    Runs and prepared data have no config.json: what it would say about special ids is in their manifest.
    """
    target = as_path(local_checkpoint(path, weights=False))
    folder = target if target.is_dir() else target.parent
    manifest = folder / "manifest.json"
    if name == "config.json" and manifest.exists() and not (folder / name).exists():
        try:
            special = special_from_json(read_json(manifest)["special"])
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{manifest} is neither that of a run nor that of prepared data ({error!r})") from error
        return {"mask_token_id": special.mask, "eos_token_id": [special.eos, special.eot, *(special.ends or ())]}
    content = read_json(folder / name) if (folder / name).exists() else {}
    if not isinstance(content, dict):
        raise UserError(f"{folder / name}: a checkpoint's {name} holds one JSON object, this does not")
    return content


def add_mask(tokenizer: Tokenizer, config: DataConfig, checkpoint: Mapping[str, int]) -> Tokenizer:
    """Returns the tokenizer with a mask token added under the next free id, as `data.add_mask_token` asks.

    Args:
        tokenizer: The checkpoint's tokenizer.
        config: The data settings; `mask_token` names the token, and where it is None LLaDA's name is used.
        checkpoint: The ids that `ids_in_checkpoint` found.

    Raises:
        UserError: If there is a mask token already, or the tokenizer is a SentencePiece model.
    """
    text = config.mask_token or MASK
    if "mask" in checkpoint:
        raise UserError(
            f"data.add_mask_token: the checkpoint of {config.tokenizer!r} has a mask token (its config.json: mask_token_id "
            f"{checkpoint['mask']}); set it to false"
        )
    if tokenizer.id_of(text) is not None:
        raise UserError(
            f"data.add_mask_token: the tokenizer {config.tokenizer!r} has {text!r} already (id {tokenizer.id_of(text)}); "
            "set it to false to use that token, or data.mask_token to another name"
        )
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise UserError(
            f"data.add_mask_token: {config.tokenizer!r} is a SentencePiece model, to which no token can be added; name an "
            f"unused token in data.mask_token ({_candidates(tokenizer)}), or convert it to a tokenizer.json "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...) in transformers)"
        )
    return tokenizer.with_special_token(text, "mask_token")


def find_special(
    tokenizer: Tokenizer,
    template_name: str,
    source: str,
    config: DataConfig,
    checkpoint: Mapping[str, int],
    ends: Sequence[int] = (),
) -> tuple[Template, SpecialIds]:
    """Finds the special tokens of a tokenizer, and makes the template with the texts of those that it may write.

    Args:
        tokenizer: The tokenizer in which the tokens' texts are looked up.
        template_name: The template's name. In the template that came with the tokenizer (`tokenizer`), `eos_token` is
            the tokenizer's own; in every other one it is the token of the end-of-sequence id that was found.
        source: The template's Jinja text.
        config: The data settings; a special token that they name overrides all other sources.
        checkpoint: The ids that `ids_in_checkpoint` found; they override the tokenizer's own settings.
        ends: The ids that `ends_in_checkpoint` found; those that the tokenizer does not have are left out.

    Raises:
        UserError: If a token cannot be found (the message names the field to set), or the mask token is also the end of the
            sequence or of a turn.
    """
    eos = _eos_id(tokenizer, config, checkpoint)
    usual_eot = next((text for text in TURN_ENDS if tokenizer.id_of(text) is not None), tokenizer.piece(eos))
    texts = {name: token_text(tokenizer.settings.get(name)) for name in _NAMED}
    if not texts["bos_token"] and tokenizer.id_of(BOS) is not None:
        texts["bos_token"] = BOS
    if template_name != "tokenizer" or not texts["eos_token"]:
        texts["eos_token"] = tokenizer.piece(eos)
    texts["eot_token"] = config.eot_token or usual_eot
    template = Template(template_name, source, {name: text for name, text in texts.items() if text})
    eot = config.eot_token or turn_end(tokenizer, template, config.system) or usual_eot
    eot_id = tokenizer.id_of(eot)
    if eot_id is None:
        raise _missing(tokenizer, config, "eot", eot, "set it to the token that ends an assistant turn")
    template = dataclasses.replace(template, tokens={**template.tokens, "eot_token": eot})
    mask = _mask_id(tokenizer, config, checkpoint)
    ends = tuple(end for end in ends if end < tokenizer.vocab_size and end not in (eos, eot_id))
    if mask in (eos, eot_id, *ends):
        raise UserError(
            f"data.mask_token: {config.mask_token or f'id {mask}'!r} is also the end-of-sequence or end-of-turn token; the "
            "mask must be a token of its own"
        )
    pad = tokenizer.id_of(texts["pad_token"]) if texts["pad_token"] else None
    pad = eos if pad is None or pad == mask else pad
    return template, SpecialIds(mask=mask, eos=eos, eot=eot_id, pad=pad, ends=ends)


def turn_end(tokenizer: Tokenizer, template: Template, system: str | None = None) -> str | None:
    """Finds the special token that a template writes right after an assistant's words, by rendering a conversation.

    Args:
        tokenizer: The tokenizer, whose special tokens are looked for.
        template: The template to render.
        system: A system message, for templates that need one.

    Returns:
        The token's text; None if the template writes none, or fails on the conversation.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        text = template.render(messages, False)
    except UserError:
        return None  # rendering the first record raises the same error again, with the record's place in the message
    rest = text[text.rfind(_PROBE) + len(_PROBE) :].lstrip() if _PROBE in text else ""
    return max((special for special in tokenizer.special_texts if rest.startswith(special)), key=len, default=None)


def _mask_id(tokenizer: Tokenizer, config: DataConfig, checkpoint: Mapping[str, int]) -> int:
    if config.mask_token is None and "mask" in checkpoint:
        return checkpoint["mask"]
    found = _first_known(tokenizer, config.mask_token, "mask_token", _MASKS)
    if found is None:
        advice = (
            "set it to the token the checkpoint was trained with (the one its config.json calls mask_token_id); for a start "
            "that has none, name an unused token, or set data.add_mask_token. Candidates: " + _candidates(tokenizer)
        )
        raise _missing(tokenizer, config, "mask", config.mask_token, advice)
    return found


def _eos_id(tokenizer: Tokenizer, config: DataConfig, checkpoint: Mapping[str, int]) -> int:
    if config.eos_token is None and checkpoint.get("eos", tokenizer.vocab_size) < tokenizer.vocab_size:
        return checkpoint["eos"]
    found = _first_known(tokenizer, config.eos_token, "eos_token", _ENDS)
    if found is None:
        advice = "set it to the tokenizer's end-of-sequence token (LLaDA pads with it too)"
        raise _missing(tokenizer, config, "eos", config.eos_token, advice)
    return found


def _first_known(tokenizer: Tokenizer, named: str | None, setting: str, usual: tuple[str, ...]) -> int | None:
    """Returns the id of the first token that the tokenizer has; None if it has none of them.

    Args:
        tokenizer: The tokenizer.
        named: The token that the config names, which is then the only one tried; None if it names none.
        setting: The name of the token in the tokenizer's settings, as in "mask_token", which is tried first.
        usual: The usual texts of such a token, which are tried after that.
    """
    texts = [named] if named else [token_text(tokenizer.settings.get(setting)), *usual]
    return next((i for text in texts if text and (i := tokenizer.id_of(text)) is not None), None)


def _missing(tokenizer: Tokenizer, config: DataConfig, name: str, text: str | None, advice: str) -> UserError:
    known = ", ".join(sorted(tokenizer.special_texts)[:20]) or "none"
    what = f"no token {text!r}" if text else f"no token that is known as {'a mask' if name == 'mask' else 'an end'}"
    return UserError(
        f"data.{name}_token: the tokenizer {config.tokenizer!r} has {what}; {advice}. Its special tokens: {known}"
    )


def _candidates(tokenizer: Tokenizer) -> str:
    """Lists up to six special tokens whose names suggest that they are masks or unused, the shortest first."""
    unused = [text for text in tokenizer.special_texts if _UNUSED.search(text)]
    unused.sort(key=lambda text: (len(text), text))
    more = f" and {len(unused) - 6} more" if len(unused) > 6 else ""
    return (", ".join(unused[:6]) or "none by name") + more

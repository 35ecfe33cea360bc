"""Special tokens: which ids a tokenizer and its checkpoint use for the mask, the end of sequence and the end of a turn."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from jaxblock.data.config import DataConfig
from jaxblock.data.tokens.templates import Template
from jaxblock.data.tokens.tokenizers import EOS, EOT, MASK, HuggingFaceTokenizer, Tokenizer, bos_text, text_of
from jaxblock.errors import UserError
from jaxblock.io.files import read_json
from jaxblock.io.hub import local_checkpoint
from jaxblock.io.paths import PathLike, as_path

TURN_ENDS = (EOT, "<|im_end|>")
"""End-of-turn tokens by the families' own names: config.json says only what the end of sequence is."""

_MASKS = (MASK, "<|mask|>", "<|MASK|>", "[MASK]", "<mask>")
_ENDS = (EOS, "<|end_of_text|>", "</s>")
_FREE = re.compile(r"mask|reserved|unused|extra|placeholder|dummy", re.IGNORECASE)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROBE = "Zq7Probe"  # stands in no template, and nothing would trim or escape it


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that the method needs.

    Attributes:
        mask: The mask token.
        eos: End of sequence: fills the rest of the terminator's block.
        eot: End of turn: ends a response.
        pad: Padding; the tokenizer's own, else `eos`. Nothing that the model sees is padded.
    """

    mask: int
    eos: int
    eot: int
    pad: int

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a response, each once."""
        return (self.eot,) if self.eot == self.eos else (self.eot, self.eos)


def first_stop(ids: Iterable[int], stop_ids: Collection[int]) -> int | None:
    """Returns the position of the first token that ends a response, None where no token does.

    ``ids[:first_stop(ids, stop_ids)]`` is thus the response's text without its terminator, in either case.

    Args:
        ids: the tokens of a response.
        stop_ids: the ids that end a response.
    """
    return next((at for at, token in enumerate(ids) if token in stop_ids), None)


def checkpoint_ids(path: PathLike) -> dict[str, int]:
    """What the config.json beside a tokenizer says: {"mask": id, "eos": id}, either absent if it does not say.

    Args:
        path: A tokenizer's folder, file or hub name.

    Raises:
        UserError: If there is a config.json that is no JSON object.
    """
    target = as_path(local_checkpoint(path, weights=False))
    file = (target if target.is_dir() else target.parent) / "config.json"
    if not file.exists():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: a checkpoint's config.json holds one JSON object, this does not")
    found = {}
    for name in ("mask", "eos"):
        value = content.get(f"{name}_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int) and not isinstance(first, bool) and first >= 0:
            found[name] = first
    return found


def add_mask(tokenizer: Tokenizer, config: DataConfig, checkpoint: Mapping[str, int]) -> Tokenizer:
    """The tokenizer with the mask token that `data.add_mask_token` asks for, under the next free id.

    Args:
        tokenizer: The checkpoint's.
        config: Names the token; LLaDA's name if it does not.
        checkpoint: As `checkpoint_ids` gives it.

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


def assemble(
    tokenizer: Tokenizer, template: str, source: str, config: DataConfig, checkpoint: Mapping[str, int]
) -> tuple[Template, SpecialIds]:
    """A template with the token texts it may use, and the special ids that go with it.

    Args:
        tokenizer: What the texts are looked up in.
        template: The template's name.
        source: Its Jinja text.
        config: Special tokens that it names win over everything else.
        checkpoint: As `checkpoint_ids` gives it; wins over the tokenizer's own settings.

    Raises:
        UserError: If a token cannot be found (naming the field to set), or the mask is used for something else too.
    """
    eos = _end_of_sequence(tokenizer, config, checkpoint)
    known = next((text for text in TURN_ENDS if tokenizer.id_of(text) is not None), tokenizer.piece(eos))
    texts = {name: text_of(tokenizer.settings.get(name)) for name in _NAMED}
    texts |= {"bos_token": bos_text(tokenizer), "eot_token": config.eot_token or known}
    if template != "tokenizer" or not texts["eos_token"]:
        texts["eos_token"] = tokenizer.piece(eos)
    tokens = {name: text for name, text in texts.items() if text}  # templates ask which of them are defined
    made = Template(template, source, tokens)
    eot = config.eot_token or turn_end(tokenizer, made, config.system) or known
    made = dataclasses.replace(made, tokens={**tokens, "eot_token": eot})
    eot_id = tokenizer.id_of(eot)
    if eot_id is None:
        raise _missing(tokenizer, config, "eot", eot, "set it to the token that ends an assistant turn")
    return made, _checked(tokenizer, config, _mask(tokenizer, config, checkpoint), eos, eot_id)


def turn_end(tokenizer: Tokenizer, template: Template, system: str | None = None) -> str | None:
    """The special token that a template writes right after an assistant's words; None if it writes none.

    Args:
        tokenizer: Says which texts are special.
        template: What is asked, by rendering a conversation.
        system: A system message, where the template cannot do without.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        text = template.render(messages, False)
    except UserError:
        return None  # it will be said of a record, with its place
    rest = text[text.rfind(_PROBE) + len(_PROBE) :].lstrip() if _PROBE in text else ""
    return max((special for special in tokenizer.special_texts if rest.startswith(special)), key=len, default=None)


def _mask(tokenizer: Tokenizer, config: DataConfig, checkpoint: Mapping[str, int]) -> int:
    if config.mask_token is None and "mask" in checkpoint:
        return checkpoint["mask"]
    own = text_of(tokenizer.settings.get("mask_token"))
    texts = [config.mask_token] if config.mask_token else [own, *_MASKS]
    found = next((i for text in texts if text and (i := tokenizer.id_of(text)) is not None), None)
    if found is None:
        raise _missing(
            tokenizer,
            config,
            "mask",
            config.mask_token,
            "set it to the token the checkpoint was trained with (the one its config.json calls mask_token_id); for a start "
            "that has none, name an unused token, or set data.add_mask_token. Candidates: " + _candidates(tokenizer),
        )
    return found


def _end_of_sequence(tokenizer: Tokenizer, config: DataConfig, checkpoint: Mapping[str, int]) -> int:
    if config.eos_token is None and checkpoint.get("eos", tokenizer.vocab_size) < tokenizer.vocab_size:
        return checkpoint["eos"]
    own = text_of(tokenizer.settings.get("eos_token"))
    texts = [config.eos_token] if config.eos_token else [own, *_ENDS]
    found = next((i for text in texts if text and (i := tokenizer.id_of(text)) is not None), None)
    if found is None:
        advice = "set it to the tokenizer's end-of-sequence token (LLaDA pads with it too)"
        raise _missing(tokenizer, config, "eos", config.eos_token, advice)
    return found


def _missing(tokenizer: Tokenizer, config: DataConfig, name: str, text: str | None, advice: str) -> UserError:
    known = ", ".join(sorted(tokenizer.special_texts)[:20]) or "none"
    what = f"no token {text!r}" if text else f"no token that is known as {'a mask' if name == 'mask' else 'an end'}"
    return UserError(
        f"data.{name}_token: the tokenizer {config.tokenizer!r} has {what}; {advice}. Its special tokens: {known}"
    )


def _candidates(tokenizer: Tokenizer) -> str:
    free = sorted((text for text in tokenizer.special_texts if _FREE.search(text)), key=lambda text: (len(text), text))
    more = f" and {len(free) - 6} more" if len(free) > 6 else ""
    return (", ".join(free[:6]) or "none by name") + more


def _checked(tokenizer: Tokenizer, config: DataConfig, mask: int, eos: int, eot: int) -> SpecialIds:
    if mask in (eos, eot):
        raise UserError(
            f"data.mask_token: {config.mask_token or f'id {mask}'!r} is also the end-of-sequence or end-of-turn token; the "
            "mask must be a token of its own"
        )
    pad_text = text_of(tokenizer.settings.get("pad_token"))
    pad = tokenizer.id_of(pad_text) if pad_text else None
    return SpecialIds(mask=mask, eos=eos, eot=eot, pad=eos if pad is None or pad == mask else pad)

"""Reads how a checkpoint turns text into tokens, and for which canvas it was trained; makes the block that an export records."""

from __future__ import annotations

import dataclasses
import json
from typing import NamedTuple

from etils import epath

from jaxblock.config.recorded import FILE, KEY, Recorded, read_block
from jaxblock.config.yaml import with_fields
from jaxblock.data.config import DataConfig
from jaxblock.data.tokens.encoding import Encoder, checkpoint_encoder
from jaxblock.data.tokens.find_special import TURN_ENDS, ends_in_checkpoint
from jaxblock.data.tokens.load import has_tokenizer, load_tokenizer
from jaxblock.data.tokens.special import SpecialIds, special_from_json
from jaxblock.data.tokens.templates import Template
from jaxblock.data.tokens.tokenizer import Tokenizer, token_text
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError, shown, warn_of_earlier_version
from jaxblock.io.files import read_bytes, read_json
from jaxblock.io.paths import PathLike, as_path
from jaxblock.models.architecture import Architecture
from jaxblock.models.families.registry import with_end
from jaxblock.training.checkpoints.run_folder import Run

_TEMPLATE, _TEMPLATE_OF_OTHERS = "template.jinja", "chat_template.jinja"


class StoredText(NamedTuple):
    """Holds what a checkpoint tells about text and decoding.

    Attributes:
        tokenizer: the tokenizer; None where the folder has none.
        encoder: the tokenizer with chat template and special ids; None where there is no template or no mask token.
        stop_ids: the tokens that end a response.
        canvas: the canvas it was trained on; the defaults where that is not recorded.
        decode: the decoder's settings; the defaults where they are not recorded.
        recorded: whether jaxblock trained the checkpoint and recorded all this.
    """

    tokenizer: Tokenizer | None
    encoder: Encoder | None
    stop_ids: tuple[int, ...]
    canvas: CanvasConfig = CanvasConfig()
    decode: DecodeConfig = DecodeConfig()
    recorded: bool = False


def text_of_run(run: Run) -> StoredText:
    """Returns what a run folder tells about text and decoding."""
    data, config = run.prepared, run.config
    return StoredText(data.tokenizer, data.encoder, data.special.stop_ids, config.canvas, config.decode, recorded=True)


def read_text(folder: PathLike, arch: Architecture) -> StoredText:
    """Reads what a folder of weights or adapters tells about text and decoding.

    Args:
        folder: a local folder; only an export of jaxblock records canvas and decoder.
        arch: the network's architecture, which gives the special ids of other folders.

    Raises:
        UserError: the tokenizer or a setting cannot be read, or the recorded ones are not those of the folder.
    """
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    recorded = read_block(folder)
    if recorded is not None and tokenizer is not None:
        own = _recorded_encoder(folder, recorded, tokenizer, arch)
        return StoredText(tokenizer, own, own.special.stop_ids, recorded.canvas, recorded.decode, recorded=True)
    ends = [arch.eos_id, *arch.end_ids, *(i for i in ends_in_checkpoint(folder) if i < arch.vocab_size)]
    if tokenizer is None:
        canvas, decode, _ = recorded or (CanvasConfig(), DecodeConfig(), None)
        return StoredText(None, None, tuple(dict.fromkeys(ends)), canvas, decode)
    if (as_path(folder) / _TEMPLATE).exists():
        warn_of_earlier_version(str(folder), "its canvas and decoding settings (the defaults are used)")
    encoder = checkpoint_encoder(folder, tokenizer, arch.mask_id, arch.eos_id)
    turn_ends = [i for text in TURN_ENDS if (i := tokenizer.id_of(text)) is not None]
    stops = [*(encoder.special.stop_ids if encoder is not None else ()), *turn_ends, *ends]
    return StoredText(tokenizer, encoder, tuple(dict.fromkeys(stops)))


def record_text(canvas: CanvasConfig, decode: DecodeConfig, encoder: Encoder) -> Recorded:
    """Describes what a checkpoint was trained for, to be recorded beside its weights.

    Args:
        canvas: the ``canvas`` section.
        decode: the ``decode`` section.
        encoder: the tokenizer, chat template, special ids, prompt template and system message.
    """
    file, sha256 = encoder.tokenizer.main_file()
    text = {
        "tokenizer": {"file": file, "sha256": sha256},
        "template": dataclasses.asdict(encoder.template),
        "special": dataclasses.asdict(encoder.special),
        "prompt_template": encoder.config.prompt_template,
        "system": encoder.config.system,
    }
    return Recorded(canvas, decode, text)


def template_for_others(encoder: Encoder) -> str:
    """Returns the chat template as other libraries render it: with values for the variables that only we give to it."""
    known = encoder.tokenizer.settings
    tokens = encoder.template.tokens.items()
    source = encoder.template.source
    own = {name: text for name, text in tokens if name in source and text != token_text(known.get(name))}
    quoted = ((name, json.dumps(text, ensure_ascii=False)) for name, text in own.items())
    return "".join(f"{{%- set {name} = {text} %}}\n" for name, text in quoted) + source


def with_recorded_end(folder: PathLike, arch: Architecture) -> Architecture:
    """Returns the architecture of an adapters' base with the end of a sequence that was recorded beside the adapters.

    Args:
        folder: the folder of the adapters.
        arch: the base's architecture; it is returned as it is where nothing is recorded.
    """
    recorded = read_block(folder)
    special = None if recorded is None else recorded.text.get("special")
    eos_id = special.get("eos") if isinstance(special, dict) else None
    return with_end(arch, eos_id) if isinstance(eos_id, int) else arch


def _recorded_encoder(folder: PathLike, recorded: Recorded, tokenizer: Tokenizer, arch: Architecture) -> Encoder:
    """Makes the encoder that was recorded; raises UserError where the folder's own files say otherwise."""
    path, text = as_path(folder), recorded.text
    where = f"{path / FILE} ({KEY})"
    try:
        template = Template(**text["template"])
        special = special_from_json(text["special"])
        file, sha256 = text["tokenizer"]["file"], text["tokenizer"]["sha256"]
        config = with_fields(DataConfig(), {name: text[name] for name in ("prompt_template", "system")}, "text")
        config.check()
        ids = (special.mask, special.pad, *special.stop_ids)
        if not all(0 <= i < arch.vocab_size for i in ids):
            raise ValueError(f"the special ids {ids} are not all ids below {arch.vocab_size}")
        if not all(
            isinstance(value, str) for value in (template.name, template.source, file, *template.tokens.values())
        ):
            raise ValueError("the template or the tokenizer's file is no text")
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{where} is not what an export writes ({error}): export the run again") from error
    again = f"Put the file back, export the run again, or, if this is meant, take {KEY!r} out of {FILE}"
    if tokenizer.main_file() != (file, sha256):
        raise UserError(f"{path / file} is not the tokenizer that the model was trained with ({where}). {again}")
    encoder = Encoder(tokenizer, template, special, config)
    for name, written in ((_TEMPLATE, template.source), (_TEMPLATE_OF_OTHERS, template_for_others(encoder))):
        own = path / name
        if own.exists() and read_bytes(own).decode(errors="replace") != written:
            raise UserError(f"{own} is not the template that the model was trained with ({where}). {again}")
    for name, there, here in (("mask", arch.mask_id, special.mask), ("eos", arch.eos_id, special.eos)):
        if there != here:
            raise UserError(f"{path}: config.json calls {there} the {name} token, {FILE} ({KEY}) {here}. {again}")
    _check_generation(path, special, again)
    return encoder


def _check_generation(path: epath.Path, special: SpecialIds, again: str) -> None:
    """Raises UserError where generation_config.json names other special ids outside our block than in it."""
    content = read_json(path / FILE)
    mask, ends = content.get("mask_token_id", special.mask), content.get("eos_token_id", [*special.stop_ids])
    listed = ends if isinstance(ends, list) else [ends]
    if mask != special.mask or any(i not in listed for i in special.stop_ids):
        raise UserError(
            f"{path / FILE} has mask_token_id {shown(mask)} and eos_token_id {shown(ends)}, but {KEY} in it {special.mask} and "
            f"{list(special.stop_ids)}. {again}"
        )

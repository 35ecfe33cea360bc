"""Lists all families, and looks up what depends on the family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxblock.errors import UserError
from jaxblock.models.architecture import Architecture
from jaxblock.models.config import ModelConfig
from jaxblock.models.families.family import Family
from jaxblock.models.families.gated import gated_table
from jaxblock.models.families.llada import LLADA
from jaxblock.models.families.llama import DREAM, LLAMA, QWEN2, QWEN3
from jaxblock.models.spec import Table
from jaxblock.settings import Alignment

FAMILIES: dict[str, Family] = {family.name: family for family in (LLADA, DREAM, LLAMA, QWEN2, QWEN3)}
"""Every supported family, by its name."""


def traits(family: str, alignment: Alignment | None = None) -> dict[str, Any]:
    """Returns the fields of ``Architecture`` that all networks of a family share.

    Args:
        family: the family's name.
        alignment: the logit alignment to give a network of an autoregressive family; None for ``shifted``.

    Raises:
        UserError: the family is a diffusion family, and ``alignment`` is not its own.
    """
    record = FAMILIES[family]
    if record.alignment is not None and alignment not in (None, record.alignment):
        raise UserError(
            f"model.alignment is {alignment}, but a {family} network's logits are {record.alignment}: leave it unset"
        )
    chosen = record.alignment or alignment or "shifted"
    return {"qkv_bias": record.qkv_bias, "qk_norm": record.qk_norm, "alignment": chosen}


_ROWS = 64
"""A vocabulary that gets a new token grows to a multiple of this, so that it can be split over devices."""


def with_mask(arch: Architecture, mask_id: int, alignment: Alignment | None = None) -> Architecture:
    """Gives an autoregressive network a mask token, which makes it a diffusion network.

    Args:
        arch: an architecture of any family; one that has a mask token keeps it.
        mask_id: a token that no text uses, or a new one after the vocabulary, which then grows to a multiple of 64 rows.
        alignment: which hidden state predicts a token; None keeps the architecture's.

    Returns:
        The architecture with the mask token and the alignment.

    Raises:
        UserError: the architecture has another mask token or, as a diffusion family, another alignment; or the id ends a
            response, or is too far outside the vocabulary.
    """
    chosen = traits(arch.family, alignment or arch.alignment)["alignment"]
    if arch.mask_id not in (None, mask_id):
        raise UserError(
            f"the mask token is to be {mask_id}, but this {arch.family} network was trained with {arch.mask_id}: use its own"
        )
    if mask_id in (arch.eos_id, *arch.end_ids):
        raise UserError(f"mask token {mask_id} is the token that ends a response: choose one that no text uses")
    if not 0 <= mask_id < arch.vocab_size + _ROWS:
        raise UserError(
            f"mask token {mask_id} is outside the vocabulary of {arch.vocab_size}: choose an unused id below that, or "
            f"{arch.vocab_size} to add one"
        )
    rows = arch.vocab_size if mask_id < arch.vocab_size else -(-(mask_id + 1) // _ROWS) * _ROWS
    return replace(arch, mask_id=mask_id, alignment=chosen, vocab_size=rows)


def with_end(arch: Architecture, eos_id: int) -> Architecture:
    """Returns the architecture with another end of a sequence; the ends that it had still end a response."""
    return replace(arch, eos_id=eos_id, end_ids=tuple(end for end in (arch.eos_id, *arch.end_ids) if end != eos_id))


def architecture_from_config(
    model: ModelConfig, *, vocab_size: int, mask_id: int, eos_id: int, pad_id: int | None = None
) -> Architecture:
    """Returns the architecture of a new network with random weights, for a tokenizer's vocabulary.

    Args:
        model: the ``model`` section, which holds the sizes.
        vocab_size: the number of the tokenizer's ids.
        mask_id: the tokenizer's mask token.
        eos_id: the tokenizer's end of sequence.
        pad_id: the tokenizer's padding; None for its end of sequence.

    Raises:
        UserError: ``model.alignment`` contradicts that of a diffusion family.
    """
    return Architecture(
        **traits(model.family, model.alignment),
        family=model.family,
        vocab_size=vocab_size,
        d_model=model.d_model,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads or model.n_heads,
        head_dim=model.d_model // model.n_heads,
        mlp_dim=model.mlp_dim,
        norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        max_len=model.max_len,
        tie_embeddings=model.tie_embeddings,
        mask_id=mask_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        init_std=model.init_std,
    )


def unused_sizes(model: ModelConfig, arch: Architecture) -> list[str]:
    """Lists the sizes in a config that differ from those of the network that ``model.init_from`` names.

    Args:
        model: the ``model`` section; sizes with their default value are ignored.
        arch: the architecture of the checkpoint that the run starts from.

    Returns:
        One text per size, such as "model.d_model is 64 (the checkpoint's is 4096)".
    """
    default = ModelConfig()
    sizes = {name: value for name, value in vars(arch).items() if name in vars(model) and name != "alignment"}
    return [
        f"model.{name} is {vars(model)[name]} (the checkpoint's is {value})"
        for name, value in sizes.items()
        if vars(model)[name] not in (vars(default)[name], value)
    ]


def param_table(arch: Architecture) -> Table:
    """Returns the specs of all parameters of an architecture, under its family's names."""
    return gated_table(arch, FAMILIES[arch.family].names)


def from_hf(config: Mapping[str, Any], where: str) -> Architecture:
    """Reads the parsed config.json of a checkpoint of any family in the table.

    Raises:
        UserError: the model type is missing or unknown (the message lists the known ones), or the family's reader
            refuses the file.
    """
    model_type = config.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family.from_hf(config, where, family)
    known = sorted(name for family in FAMILIES.values() for name in family.model_types)
    raise UserError(f"{where}: model_type is {model_type!r}; known types: {', '.join(known)}")


def to_hf(arch: Architecture, dtype: str) -> dict[str, Any]:
    """Makes the config.json of an architecture; ``dtype`` is the type of the tensors, as torch spells it.

    A field that the origin's config.json wrote in another way, such as a null or a list of one id, stays as it was there where
    that means the same architecture; so does a padding token that it left out.
    """
    family = FAMILIES[arch.family]
    made = family.to_hf(arch, dtype, family)
    origin = {name: json.loads(value) for name, value in arch.extra}
    for name in [name for name, value in made.items() if name in origin and origin[name] != value]:
        other = {**made, name: origin[name]}
        if name not in ("dtype", "torch_dtype") and _means(other, arch, family):
            made = other
    if origin and "pad_token_id" not in origin:
        other = {name: value for name, value in made.items() if name != "pad_token_id"}
        made = other if _means(other, arch, family) else made
    return made


def _means(config: Mapping[str, Any], arch: Architecture, family: Family) -> bool:
    """Tells whether a config.json describes this architecture."""
    try:
        return replace(family.from_hf(config, "", family), extra=()) == replace(arch, extra=())
    except UserError:
        return False

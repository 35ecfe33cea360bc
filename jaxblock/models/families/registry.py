"""The families we know. Adding one is adding a module: ``MODEL_TYPES``, ``TRAITS``, ``table``, ``from_hf``, ``to_hf``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from jaxblock.errors import UserError
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import dream, llada, llama, qwen2, qwen3
from jaxblock.models.spec import Table
from jaxblock.settings import Alignment

FAMILIES: dict[str, ModuleType] = {"llada": llada, "dream": dream, "llama": llama, "qwen2": qwen2, "qwen3": qwen3}


def traits(family: str, alignment: Alignment | None = None) -> dict[str, Any]:
    """What a family's networks have in common: fields of ``Architecture``.

    Args:
        family: key of ``FAMILIES``.
        alignment: of an autoregressive family; None for ``shifted``.

    Raises:
        UserError: the alignment of a diffusion family cannot be chosen.
    """
    fixed: dict[str, Any] = FAMILIES[family].TRAITS
    if "alignment" not in fixed:
        return {**fixed, "alignment": alignment or "shifted"}
    if alignment not in (None, fixed["alignment"]):
        raise UserError(
            f"model.alignment is {alignment}, but a {family} network's logits are {fixed['alignment']}: leave it unset"
        )
    return fixed


_ROWS = 64
"""A vocabulary that takes a new token grows to a multiple of this: sizes that divide over devices."""


def with_mask(arch: Architecture, mask_id: int, alignment: Alignment | None = None) -> Architecture:
    """Gives an autoregressive network the mask token that makes a diffusion network of it.

    Args:
        arch: of any family; one that has a mask token keeps it.
        mask_id: a token that its text never uses, or the first after the vocabulary, which then grows to a multiple of
            64 rows.
        alignment: which hidden state predicts a token; None keeps ``arch``'s.

    Returns:
        The architecture with both.

    Raises:
        UserError: it has another mask token or, as a diffusion family, another alignment; the id ends a response, or is
            no id of the vocabulary nor the next one.
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


def param_table(arch: Architecture) -> Table:
    """The table of an architecture's family."""
    return FAMILIES[arch.family].param_table(arch)


def from_hf(config: Mapping[str, Any], where: str) -> Architecture:
    """Reads a config.json of any family we know.

    Raises:
        UserError: the model type is missing or unknown; the message lists those we know.
    """
    model_type = config.get("model_type")
    for module in FAMILIES.values():
        if model_type in module.MODEL_TYPES:
            return module.from_hf(config, where)
    known = sorted(t for m in FAMILIES.values() for t in m.MODEL_TYPES)
    raise UserError(f"{where}: model_type is {model_type!r}; known types: {', '.join(known)}")


def to_hf(arch: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json of an architecture."""
    return FAMILIES[arch.family].to_hf(arch, dtype)

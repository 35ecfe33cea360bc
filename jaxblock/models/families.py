"""The families we know. Adding one is adding a module: ``MODEL_TYPES``, ``TRAITS``, ``table``, ``from_hf``, ``to_hf``."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxblock.errors import UserError
from jaxblock.models import dream, llada, llama, qwen2, qwen3
from jaxblock.models.params import Architecture, Table
from jaxblock.types import Alignment

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


def table(arch: Architecture) -> Table:
    """The table of an architecture's family."""
    return FAMILIES[arch.family].table(arch)


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

"""The families we know. Adding one is adding a module with ``table``, ``from_hf``, ``to_hf`` and ``MODEL_TYPES``."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxblock.errors import UserError
from jaxblock.models import llada
from jaxblock.models.params import Architecture, Table

FAMILIES: dict[str, ModuleType] = {"llada": llada}


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

"""Qwen3: Llama's block with queries and keys normalised by head.

transformers' Qwen3ForCausalLM, read as a bidirectional network: the usual start of a new diffusion model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxblock.models.architecture import Architecture
from jaxblock.models.families import gated
from jaxblock.models.families.config_json import read_llama, write_llama
from jaxblock.models.spec import Table

MODEL_TYPES = ("qwen3",)

TRAITS: dict[str, Any] = {"qk_norm": True}
"""Fields of ``Architecture`` that all networks of the family share."""


def param_table(arch: Architecture) -> Table:
    """Every tensor of the network (see ``gated.gated_table``)."""
    return gated.gated_table(arch, gated.LLAMA_NAMES)


def from_hf(config: Mapping[str, Any], where: str) -> Architecture:
    """Reads a Qwen3 config.json (see ``hf_config.read_llama``)."""
    return read_llama(config, where, "qwen3", traits=TRAITS)


def to_hf(arch: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json of a network (see ``hf_config.write_llama``)."""
    own = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": arch.head_dim}
    return write_llama(arch, dtype, own, autoregressive=True)

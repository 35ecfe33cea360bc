"""Qwen2 and Qwen2.5: Llama's block with biases on queries, keys and values.

transformers' Qwen2ForCausalLM, read as a bidirectional network: the usual start of a new diffusion model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxblock.models.architecture import Architecture
from jaxblock.models.families import gated
from jaxblock.models.families.config_json import read_llama, write_llama
from jaxblock.models.spec import Table

MODEL_TYPES = ("qwen2",)

TRAITS: dict[str, Any] = {"qkv_bias": True}
"""Fields of ``Architecture`` that all networks of the family share."""


def param_table(arch: Architecture) -> Table:
    """Every tensor of the network (see ``gated.gated_table``)."""
    return gated.gated_table(arch, gated.LLAMA_NAMES)


def from_hf(config: Mapping[str, Any], where: str) -> Architecture:
    """Reads a Qwen2 config.json (see ``hf_config.read_llama``)."""
    return read_llama(config, where, "qwen2", attention_bias=True, traits=TRAITS)


def to_hf(arch: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json of a network (see ``hf_config.write_llama``)."""
    own = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return write_llama(arch, dtype, own, autoregressive=True)

"""Llama: RMSNorm, grouped keys and values, SwiGLU, no biases; also SmolLM2, TinyLlama and others of this layout.

transformers' LlamaForCausalLM, read as a bidirectional network: the usual start of a new diffusion model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxblock.models.architecture import Architecture
from jaxblock.models.families import gated
from jaxblock.models.families.config_json import read_llama, write_llama
from jaxblock.models.spec import Table

MODEL_TYPES = ("llama",)

TRAITS: dict[str, Any] = {}
"""Fields of ``Architecture`` that all networks of the family share."""


def param_table(arch: Architecture) -> Table:
    """Every tensor of the network (see ``gated.gated_table``)."""
    return gated.gated_table(arch, gated.LLAMA_NAMES)


def from_hf(config: Mapping[str, Any], where: str) -> Architecture:
    """Reads a Llama config.json (see ``hf_config.read_llama``)."""
    return read_llama(config, where, "llama", traits=TRAITS)


def to_hf(arch: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json of a network (see ``hf_config.write_llama``)."""
    own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return write_llama(arch, dtype, own, autoregressive=True)

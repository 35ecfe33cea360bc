"""Dream: Qwen2.5's body without the causal mask, its logits shifted by one. DiffuCoder and Dream-Coder are of this family.

Biases on queries, keys and values; grouped keys and values. Names follow the published checkpoints (Dream-org/Dream-*).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxblock.models.architecture import Architecture
from jaxblock.models.families import gated
from jaxblock.models.families.config_json import read_llama, write_llama
from jaxblock.models.spec import Table

MODEL_TYPES = ("Dream",)

TRAITS: dict[str, Any] = {"qkv_bias": True, "alignment": "shifted"}
"""Fields of ``Architecture`` that all networks of the family share."""

CODE = "Dream-org/Dream-v0-Instruct-7B"
"""transformers has no Dream of its own: an export without model code beside it names the repository that has it."""


def param_table(arch: Architecture) -> Table:
    """Every tensor of the network (see ``gated.gated_table``)."""
    return gated.gated_table(arch, gated.LLAMA_NAMES)


def from_hf(config: Mapping[str, Any], where: str) -> Architecture:
    """Reads Dream's config.json (see ``hf_config.read_llama``)."""
    return read_llama(config, where, "dream", attention_bias=True, traits=TRAITS)


def to_hf(arch: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json of a network (see ``hf_config.write_llama``)."""
    own = {
        "architectures": ["DreamModel"],
        "auto_map": {
            "AutoConfig": CODE + "--configuration_dream.DreamConfig",
            "AutoModel": CODE + "--modeling_dream.DreamModel",
        },
        "model_type": "Dream",
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    return write_llama(arch, dtype, own)

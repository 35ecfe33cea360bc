"""Reads and writes config.json in Llama's layout, and describes the families that share it and the tensor names.

A family of this layout is one record at the end of this file. Autoregressive checkpoints are read as bidirectional
networks, since they are the usual start of a new diffusion model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxblock.models.architecture import Architecture
from jaxblock.models.families.config_json import Fields, add_rope_and_dtype
from jaxblock.models.families.family import Family

ALIGNMENT = "logit_alignment"
"""Our own field of config.json; it records the logit alignment of a diffusion model that was trained from an autoregressive
checkpoint. transformers keeps fields that it does not know."""

_LAYER = "model.layers.{layer}."
NAMES: dict[str, str] = {
    "embed": "model.embed_tokens",
    "attn_norm": _LAYER + "input_layernorm",
    "q": _LAYER + "self_attn.q_proj",
    "k": _LAYER + "self_attn.k_proj",
    "v": _LAYER + "self_attn.v_proj",
    "q_norm": _LAYER + "self_attn.q_norm",
    "k_norm": _LAYER + "self_attn.k_norm",
    "o": _LAYER + "self_attn.o_proj",
    "mlp_norm": _LAYER + "post_attention_layernorm",
    "gate": _LAYER + "mlp.gate_proj",
    "up": _LAYER + "mlp.up_proj",
    "down": _LAYER + "mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
"""The module names of Llama's layout in transformers."""

# Fields of which only these values are supported. A checkpoint with another value would load and give wrong results.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "pretraining_tp": (1,),
    ALIGNMENT: ("same_position", "shifted"),
}


def read_llama_config(config: Mapping[str, Any], where: str, family: Family) -> Architecture:
    """Reads a config.json in Llama's layout.

    Args:
        config: the parsed file.
        where: the file's path, for messages.
        family: the family that the file's ``model_type`` names.

    Returns:
        The architecture; every special id comes from the file.

    Raises:
        UserError: a field is missing, or has a value that the network does not support.
    """
    fields = Fields(config, where, family.name)
    fields.check_fixed({**_FIXED, "attention_bias": (family.qkv_bias,)})
    if "sliding_attention" in fields.get("layer_types", []):
        raise fields.error("layer_types asks for sliding_attention; this reader supports full attention only")
    d_model, n_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    vocab = fields.size("vocab_size")
    ends = fields.tokens("eos_token_id", vocab)
    if not ends:
        raise fields.error("eos_token_id is missing; set it to the token that ends a sequence")
    n_kv_heads = fields.size("num_key_value_heads", n_heads)
    head_dim = fields.size("head_dim", d_model // n_heads)
    fields.check_heads(d_model, n_heads, n_kv_heads, None if fields.get("head_dim") is None else head_dim)
    mask_id = (
        fields.token("mask_token_id", vocab) if family.alignment is None else fields.need_token("mask_token_id", vocab)
    )
    return Architecture(
        family=family.name,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        alignment=family.alignment or fields.get(ALIGNMENT, "shifted"),
        vocab_size=vocab,
        d_model=d_model,
        n_layers=fields.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        mlp_dim=fields.size("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=fields.rope_theta(),
        max_len=fields.size("max_position_embeddings"),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        mask_id=mask_id,
        eos_id=ends[0],
        pad_id=fields.token("pad_token_id", vocab, ends[0]) or 0,
        end_ids=ends[1:],
        rope_scaling=fields.rope_scaling(),
        init_std=fields.get("initializer_range", 0.02),
        extra=fields.kept(),
    )


def make_llama_config(arch: Architecture, dtype: str, family: Family) -> dict[str, Any]:
    """Makes a config.json in Llama's layout.

    Args:
        arch: the architecture; fields of the file that it was read from and that we do not use are written back.
        dtype: the tensors' type, as torch spells it.
        family: the architecture's family. If it is autoregressive, the file also records the mask token and the logit
            alignment of the diffusion model that was trained from it.

    Returns:
        The dict to write.
    """
    config: dict[str, Any] = {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": arch.init_std if arch.init_std is not None else 0.02,
        "model_type": family.model_types[0],
        "use_cache": False,
        **family.new_config,
    }
    config |= {key: json.loads(value) for key, value in arch.extra}
    config |= {
        "eos_token_id": [arch.eos_id, *arch.end_ids] if arch.end_ids else arch.eos_id,
        "hidden_size": arch.d_model,
        "intermediate_size": arch.mlp_dim,
        "max_position_embeddings": arch.max_len,
        "num_attention_heads": arch.n_heads,
        "num_hidden_layers": arch.n_layers,
        "num_key_value_heads": arch.n_kv_heads,
        "pad_token_id": arch.pad_id,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "vocab_size": arch.vocab_size,
    }
    if config.get("head_dim") is not None or arch.head_dim * arch.n_heads != arch.d_model:
        config["head_dim"] = arch.head_dim
    if arch.mask_id is not None:
        config["mask_token_id"] = arch.mask_id
        if family.alignment is None:
            config[ALIGNMENT] = arch.alignment
    return add_rope_and_dtype(config, arch, dtype)


def _llama_like(name: str, new_config: Mapping[str, Any], model_type: str | None = None, **rest: Any) -> Family:
    """Makes the record of a family whose config.json and tensors have Llama's layout."""
    return Family(
        name=name,
        model_types=(model_type or name,),
        names=NAMES,
        from_hf=read_llama_config,
        to_hf=make_llama_config,
        new_config=new_config,
        **rest,
    )


# RMSNorm, grouped keys and values, SwiGLU, no biases. SmolLM2, TinyLlama and others belong to this family.
LLAMA = _llama_like("llama", {"architectures": ["LlamaForCausalLM"]})

# Qwen2 and Qwen2.5.
QWEN2 = _llama_like("qwen2", {"architectures": ["Qwen2ForCausalLM"]}, qkv_bias=True)

# head_dim is always written, because transformers assumes 128 where config.json has none.
QWEN3 = _llama_like("qwen3", {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128}, qk_norm=True)

_DREAM_CODE = "Dream-org/Dream-v0-Instruct-7B"

# Qwen2.5's network without the causal mask, with logits shifted by one. DiffuCoder and Dream-Coder belong to this family.
DREAM = _llama_like(
    "dream",
    {
        "architectures": ["DreamModel"],
        "auto_map": {
            "AutoConfig": _DREAM_CODE + "--configuration_dream.DreamConfig",
            "AutoModel": _DREAM_CODE + "--modeling_dream.DreamModel",
        },
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    model_type="Dream",
    qkv_bias=True,
    alignment="shifted",
    code=_DREAM_CODE,
)

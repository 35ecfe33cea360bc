"""Reads and writes config.json in Llama's layout, and describes the families that share it and the tensor names.

A family of this layout is one record at the end of this file. Autoregressive checkpoints are read as bidirectional
networks, since they are the usual start of a new diffusion model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxblock.errors import shown
from jaxblock.models.architecture import Architecture
from jaxblock.models.families.config_json import MOST_LAYERS, UNSUPPORTED, Fields
from jaxblock.models.families.family import Family
from jaxblock.models.families.rope_config import add_rope, read_rope_scaling, read_rope_theta

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
    ALIGNMENT: ("same_position", "shifted"),
    **UNSUPPORTED,
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
    # Qwen2's layout always has these three biases, whatever its config.json says.
    fields.check_fixed(_FIXED if family.qkv_bias else {**_FIXED, "attention_bias": (False,), "mlp_bias": (False,)})
    n_layers, max_len = fields.size("num_hidden_layers", most=MOST_LAYERS), fields.size("max_position_embeddings")
    _check_full_attention(fields, n_layers, max_len)
    d_model, n_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    vocab = fields.size("vocab_size")
    ends = fields.tokens("eos_token_id", vocab)
    if not ends:
        raise fields.error("eos_token_id is missing; set it to the token that ends a sequence")
    n_kv_heads = fields.size("num_key_value_heads", n_heads)
    usual_head = family.head_dim or max(d_model // n_heads, 1)
    head_dim = fields.size("head_dim", usual_head)
    fields.check_heads(
        d_model, n_heads, n_kv_heads, None if fields.get("head_dim", family.head_dim) is None else head_dim
    )
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
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        mlp_dim=fields.size("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=read_rope_theta(fields),
        max_len=max_len,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        mask_id=mask_id,
        eos_id=ends[0],
        pad_id=fields.token("pad_token_id", vocab, ends[0]) or 0,
        end_ids=ends[1:],
        rope_scaling=read_rope_scaling(fields, max_len),
        init_std=fields.number("initializer_range", 0.02, zero=True),
        extra=fields.kept(),
    )


def _check_full_attention(fields: Fields, n_layers: int, max_len: int) -> None:
    """Raises a UserError where a layer's attention would not see all of a sequence that fits the network.

    Windows are off without ``use_sliding_window``, and change nothing that is shorter than they are.
    """
    kinds = fields.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) < n_layers):
        raise fields.error(f"layer_types is {shown(kinds)}; it must name the attention of each of {n_layers} layers")
    other = [kind for kind in kinds or () if kind not in ("full_attention", "sliding_attention")]
    if other:
        raise fields.error(f"layer_types asks for {shown(other[0])}; this reader supports full attention only")
    # 4096 and 28 are transformers' defaults for Qwen2 and Qwen3; a null window is none.
    window = fields.size("sliding_window", max_len if fields.names("sliding_window") else 4096)
    if not fields.flag("use_sliding_window") or window >= max_len:
        return
    first = fields.number("max_window_layers", 28.0, zero=True)
    if "sliding_attention" in kinds if kinds else first < n_layers:
        raise fields.error(
            f"use_sliding_window is True, with a sliding_window of {window} positions; this reader "
            "supports full attention only"
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
    add_rope(config, arch)
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return config


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
QWEN3 = _llama_like("qwen3", {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128}, qk_norm=True, head_dim=128)

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

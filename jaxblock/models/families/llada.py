"""Describes LLaDA: a Llama block without the causal mask, with its own config.json and its own tensor names.

RMSNorm, rotary positions (half-split), SwiGLU, no biases; keys and values may be grouped, embeddings may be tied.
Names follow the published checkpoints (GSAI-ML/LLaDA-8B-*).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxblock.models.architecture import Architecture
from jaxblock.models.families.config_json import MOST_LAYERS, UNSUPPORTED, Fields
from jaxblock.models.families.family import Family
from jaxblock.models.families.rope_config import add_rope, read_rope_scaling, read_rope_theta

# Fields of which only these values are supported. A checkpoint with another value would load and give wrong results.
_FIXED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "activation_type": ("silu", "swiglu"),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "attention_layer_norm": (False,),
    "scale_logits": (False,),
    "input_emb_norm": (False,),
    "multi_query_attention": (False,),
    **UNSUPPORTED,
}

_BLOCK = "model.transformer.blocks.{layer}."
_NAMES = {
    "embed": "model.transformer.wte",
    "attn_norm": _BLOCK + "attn_norm",
    "q": _BLOCK + "q_proj",
    "k": _BLOCK + "k_proj",
    "v": _BLOCK + "v_proj",
    "o": _BLOCK + "attn_out",
    "mlp_norm": _BLOCK + "ff_norm",
    "gate": _BLOCK + "ff_proj",
    "up": _BLOCK + "up_proj",
    "down": _BLOCK + "ff_out",
    "final_norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
}

_CODE = "GSAI-ML/LLaDA-8B-Instruct"


def read_llada_config(config: Mapping[str, Any], where: str, family: Family) -> Architecture:
    """Reads the sizes and special ids in a config.json of LLaDA.

    Args:
        config: the parsed file.
        where: the file's path, for messages.
        family: LLaDA's record.

    Returns:
        The architecture; every special id comes from the file.

    Raises:
        UserError: a field is missing, or has a value that the network does not support.
    """
    fields = Fields(config, where, "LLaDA")
    fields.check_fixed(_FIXED)
    if fields.get("clip_qkv") is not None:
        raise fields.error(f"clip_qkv is {fields.get('clip_qkv')!r}; this reader supports none")
    max_len = fields.size("max_sequence_length", 4096)
    if read_rope_scaling(fields, max_len) is not None:
        raise fields.error("rope_scaling is set, which LLaDA's own code does not know: take it out")
    d_model, n_heads = fields.size("d_model"), fields.size("n_heads")
    n_kv_heads = fields.size("n_kv_heads", n_heads)
    fields.check_heads(d_model, n_heads, n_kv_heads)
    vocab = fields.size("embedding_size") if fields.get("embedding_size") else fields.size("vocab_size")
    eos_id = fields.need_token("eos_token_id", vocab)
    return Architecture(
        family=family.name,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        alignment=family.alignment or "same_position",
        vocab_size=vocab,
        d_model=d_model,
        n_layers=fields.size("n_layers", most=MOST_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=d_model // n_heads,
        mlp_dim=fields.size("mlp_hidden_size", int(fields.number("mlp_ratio", 4.0) * d_model)),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        rope_theta=read_rope_theta(fields),
        max_len=max_len,
        tie_embeddings=fields.flag("weight_tying"),
        mask_id=fields.need_token("mask_token_id", vocab),
        eos_id=eos_id,
        pad_id=fields.token("pad_token_id", vocab, eos_id) or 0,
        end_ids=fields.tokens("eos_token_id", vocab)[1:],
        init_std=fields.number("init_std", 0.02, zero=True) if fields.get("init_fn") == "normal" else None,
        extra=fields.kept(),
    )


def make_llada_config(arch: Architecture, dtype: str, family: Family) -> dict[str, Any]:
    """Makes a config.json in the layout of the published checkpoints.

    Args:
        arch: the architecture; fields of the file that it was read from and that we do not use are written back.
        dtype: the tensors' type, as torch spells it.
        family: LLaDA's record.

    Returns:
        The dict to write.
    """
    config: dict[str, Any] = dict(family.new_config)
    config["init_fn"] = "mitchell" if arch.init_std is None else "normal"
    config |= {key: json.loads(value) for key, value in arch.extra}
    config |= {
        "d_model": arch.d_model,
        "embedding_size": arch.vocab_size,
        "eos_token_id": [arch.eos_id, *arch.end_ids] if arch.end_ids else arch.eos_id,
        "mask_token_id": arch.mask_id,
        "max_sequence_length": arch.max_len,
        "mlp_hidden_size": arch.mlp_dim,
        "n_heads": arch.n_heads,
        "n_kv_heads": arch.n_kv_heads,
        "n_layers": arch.n_layers,
        "pad_token_id": arch.pad_id,
        "rms_norm_eps": arch.norm_eps,
        "vocab_size": arch.vocab_size,
        "weight_tying": arch.tie_embeddings,
    }
    if arch.init_std is not None:
        config["init_std"] = arch.init_std
    add_rope(config, arch)
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return config


LLADA = Family(
    name="llada",
    model_types=("llada",),
    names=_NAMES,
    from_hf=read_llada_config,
    to_hf=make_llada_config,
    alignment="same_position",
    tied_field="weight_tying",
    new_config={
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "auto_map": {
            "AutoConfig": _CODE + "--configuration_llada.LLaDAConfig",
            "AutoModel": _CODE + "--modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": _CODE + "--modeling_llada.LLaDAModelLM",
        },
        "block_type": "llama",
        "embedding_dropout": 0.0,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "mlp_ratio": 4,
        "model_type": "llada",
        "residual_dropout": 0.0,
        "rope": True,
        "rope_full_precision": True,
        "scale_logits": False,
        "use_cache": False,
    },
    code=_CODE,
)

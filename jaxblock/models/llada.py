"""LLaDA: a Llama block without the causal mask. Its config.json and its table of parameters.

RMSNorm, rotary positions (half-split), SwiGLU, no biases; keys and values may be grouped, embeddings may be tied.
Names follow the published checkpoints (GSAI-ML/LLaDA-8B-*).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxblock.errors import UserError
from jaxblock.models.params import Architecture, ParamSpec, Table

MODEL_TYPES = ("llada",)

# What the network computes and we do not: a checkpoint that says otherwise would load and be wrong.
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
}

# transformers has no LLaDA of its own: an export without model code beside it names the repository that has it.
_CODE = "GSAI-ML/LLaDA-8B-Instruct--"


def table(arch: Architecture) -> Table:
    """Every tensor of the network.

    Args:
        arch: sizes.

    Returns:
        Specs by path. Matrices are [in, out]; q, k and v are flat over (heads, head_dim).
    """
    d, f, n_layers = arch.d_model, arch.mlp_dim, arch.n_layers
    q_dim, kv_dim = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    prefix = "model.transformer.blocks.{layer}."

    def matrix(name: str, n_in: int, n_out: int, axes: tuple[str, str], residual: bool = False) -> ParamSpec:
        shape, hf_name = (n_layers, n_in, n_out), prefix + name + ".weight"
        if arch.init_std is not None:
            std = arch.init_std * ((2 * n_layers) ** -0.5 if residual else 1.0)
            return ParamSpec(shape, ("layers", *axes), std, hf_name, transpose=True)
        # Mitchell initialisation: 1/sqrt(fan in), outputs into the residual stream smaller with depth.
        std = (2 * n_in) ** -0.5 if residual else n_in**-0.5
        return ParamSpec(shape, ("layers", *axes), std, hf_name, transpose=True, depth_scaled=residual)

    def norm(name: str) -> ParamSpec:
        return ParamSpec((n_layers, d), ("layers", "embed"), None, prefix + name + ".weight")

    vector_std = d**-0.5 if arch.init_std is None else arch.init_std
    specs = {
        "embed": ParamSpec((arch.vocab_size, d), ("vocab", "embed"), vector_std, "model.transformer.wte.weight"),
        "blocks/attn_norm": norm("attn_norm"),
        "blocks/q": matrix("q_proj", d, q_dim, ("embed", "heads")),
        "blocks/k": matrix("k_proj", d, kv_dim, ("embed", "kv_heads")),
        "blocks/v": matrix("v_proj", d, kv_dim, ("embed", "kv_heads")),
        "blocks/o": matrix("attn_out", q_dim, d, ("heads", "embed"), residual=True),
        "blocks/mlp_norm": norm("ff_norm"),
        "blocks/gate": matrix("ff_proj", d, f, ("embed", "mlp")),
        "blocks/up": matrix("up_proj", d, f, ("embed", "mlp")),
        "blocks/down": matrix("ff_out", f, d, ("mlp", "embed"), residual=True),
        "final_norm": ParamSpec((d,), ("embed",), None, "model.transformer.ln_f.weight"),
    }
    if not arch.tie_embeddings:
        shape, axes = (d, arch.vocab_size), ("embed", "vocab")
        specs["head"] = ParamSpec(shape, axes, vector_std, "model.transformer.ff_out.weight", transpose=True)
    return specs


def from_hf(config: Mapping[str, Any], where: str) -> Architecture:
    """Reads LLaDA's config.json.

    Args:
        config: the parsed file.
        where: its path, for messages.

    Returns:
        The architecture; every special id comes from the config.

    Raises:
        UserError: a field is missing, or asks for something that the network does not do.
    """
    for field, allowed in _FIXED.items():
        if field in config and config[field] not in allowed:
            raise UserError(f"{where}: {field} is {config[field]!r}; this LLaDA reader supports {allowed[0]!r} only")

    def need(field: str) -> Any:
        if config.get(field) is None:
            raise UserError(f"{where}: field {field!r} is missing; a LLaDA config must have it")
        return config[field]

    d_model, n_heads = need("d_model"), need("n_heads")
    rope = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10_000.0
    vocab = config.get("embedding_size") or need("vocab_size")
    return Architecture(
        family="llada",
        vocab_size=vocab,
        d_model=d_model,
        n_layers=need("n_layers"),
        n_heads=n_heads,
        n_kv_heads=config.get("n_kv_heads") or n_heads,
        head_dim=d_model // n_heads,
        mlp_dim=config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * d_model,
        norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_theta=float(rope),
        max_len=config.get("max_sequence_length", 4096),
        tie_embeddings=bool(config.get("weight_tying", False)),
        mask_id=need("mask_token_id"),
        eos_id=need("eos_token_id"),
        pad_id=config.get("pad_token_id", need("eos_token_id")),
        init_std=config.get("init_std") if config.get("init_fn") == "normal" else None,
        extra=tuple(sorted((k, json.dumps(v)) for k, v in config.items())),
    )


def to_hf(arch: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json of a network, in the layout of the published checkpoints.

    Args:
        arch: sizes and ids; what ``from_hf`` read and did not use is written back as it was.
        dtype: the tensors' type, as torch spells it.

    Returns:
        The dict to write.
    """
    config: dict[str, Any] = {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "auto_map": {
            "AutoConfig": _CODE + "configuration_llada.LLaDAConfig",
            "AutoModel": _CODE + "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": _CODE + "modeling_llada.LLaDAModelLM",
        },
        "block_type": "llama",
        "embedding_dropout": 0.0,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_fn": "mitchell" if arch.init_std is None else "normal",
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "mlp_ratio": 4,
        "model_type": "llada",
        "residual_dropout": 0.0,
        "rope": True,
        "rope_full_precision": True,
        "scale_logits": False,
        "use_cache": False,
    }
    config |= {key: json.loads(value) for key, value in arch.extra}
    config |= {
        "d_model": arch.d_model,
        "embedding_size": arch.vocab_size,
        "eos_token_id": arch.eos_id,
        "mask_token_id": arch.mask_id,
        "max_sequence_length": arch.max_len,
        "mlp_hidden_size": arch.mlp_dim,
        "n_heads": arch.n_heads,
        "n_kv_heads": arch.n_kv_heads,
        "n_layers": arch.n_layers,
        "pad_token_id": arch.pad_id,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "torch_dtype": dtype,
        "vocab_size": arch.vocab_size,
        "weight_tying": arch.tie_embeddings,
    }
    if arch.init_std is not None:
        config["init_std"] = arch.init_std
    if "dtype" in config:
        config["dtype"] = dtype
    return config

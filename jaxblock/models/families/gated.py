"""Makes the table of parameters of a gated transformer, which all families share; only the tensor names differ."""

from __future__ import annotations

from collections.abc import Mapping

from jaxblock.models.architecture import Architecture
from jaxblock.models.spec import ParamSpec, Table


def gated_table(arch: Architecture, names: Mapping[str, str]) -> Table:
    """Returns the specs of layers of RMSNorm, grouped attention and a gated feed-forward layer, with embedding and head.

    Args:
        arch: the sizes; ``qkv_bias``, ``qk_norm`` and ``tie_embeddings`` say which parameters exist.
        names: the checkpoint's module name for each parameter, with ``{layer}`` for the layer's index.

    Returns:
        The specs by path. Matrices are [in, out]; the outputs of q, k and v are flat over (heads, head_dim).
    """
    d, f, n_layers, std = arch.d_model, arch.mlp_dim, arch.n_layers, arch.init_std
    q_dim, kv_dim = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim

    def matrix(name: str, n_in: int, n_out: int, axes: tuple[str, str], residual: bool = False) -> ParamSpec:
        shape, hf_name = (n_layers, n_in, n_out), names[name] + ".weight"
        if std is not None:
            own = std * ((2 * n_layers) ** -0.5 if residual else 1.0)
            return ParamSpec(shape, ("layers", *axes), own, hf_name, transpose=True)
        # Mitchell initialisation: 1/sqrt(fan in); outputs into the residual stream get smaller with depth.
        own = (2 * n_in) ** -0.5 if residual else n_in**-0.5
        return ParamSpec(shape, ("layers", *axes), own, hf_name, transpose=True, depth_scaled=residual)

    def norm(name: str, size: int, axis: str | None) -> ParamSpec:
        return ParamSpec((n_layers, size), ("layers", axis), None, names[name] + ".weight")

    def bias(name: str, size: int, axis: str) -> ParamSpec:
        return ParamSpec((n_layers, size), ("layers", axis), 0.0, names[name] + ".bias")

    vector_std = d**-0.5 if std is None else std
    specs = {
        "embed": ParamSpec((arch.vocab_size, d), ("vocab", "embed"), vector_std, names["embed"] + ".weight"),
        "blocks/attn_norm": norm("attn_norm", d, "embed"),
        "blocks/q": matrix("q", d, q_dim, ("embed", "heads")),
        "blocks/k": matrix("k", d, kv_dim, ("embed", "kv_heads")),
        "blocks/v": matrix("v", d, kv_dim, ("embed", "kv_heads")),
    }
    if arch.qkv_bias:
        specs["blocks/q_bias"] = bias("q", q_dim, "heads")
        specs["blocks/k_bias"] = bias("k", kv_dim, "kv_heads")
        specs["blocks/v_bias"] = bias("v", kv_dim, "kv_heads")
    if arch.qk_norm:
        specs["blocks/q_norm"] = norm("q_norm", arch.head_dim, None)
        specs["blocks/k_norm"] = norm("k_norm", arch.head_dim, None)
    specs |= {
        "blocks/o": matrix("o", q_dim, d, ("heads", "embed"), residual=True),
        "blocks/mlp_norm": norm("mlp_norm", d, "embed"),
        "blocks/gate": matrix("gate", d, f, ("embed", "mlp")),
        "blocks/up": matrix("up", d, f, ("embed", "mlp")),
        "blocks/down": matrix("down", f, d, ("mlp", "embed"), residual=True),
        "final_norm": ParamSpec((d,), ("embed",), None, names["final_norm"] + ".weight"),
    }
    if not arch.tie_embeddings:
        shape, axes = (d, arch.vocab_size), ("embed", "vocab")
        specs["head"] = ParamSpec(shape, axes, vector_std, names["head"] + ".weight", transpose=True)
    return specs

"""The `model` and `lora` sections: where the network comes from and how it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxblock.settings import Alignment


@dataclass(frozen=True)
class ModelConfig:
    """Where the network comes from and how it runs; the sizes matter for a random start only."""

    init_from: str | None = None
    """A run folder, a Hugging Face folder or a hub id (`org/name`) to start from; None starts from random weights."""
    init_step: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run to start from: the newest, the best by its `train.keep_best`, or that of a step."""
    alignment: Alignment | None = None
    """Logit alignment of an autoregressive start (Llama, Qwen): `shifted` keeps its next-token skill, `same_position` is
    LLaDA's; None for `shifted`. The diffusion families have their own."""
    quantize: Literal["none", "int8"] = "none"
    """Keep the layers' matrices in int8: half of bfloat16's memory. For the frozen base of LoRA only."""
    family: Literal["llada", "dream", "llama", "qwen2", "qwen3"] = "llada"
    """Architecture of a random start."""
    d_model: int = 128
    """Width."""
    n_layers: int = 4
    """Layers."""
    n_heads: int = 4
    """Query heads."""
    n_kv_heads: int | None = None
    """Key/value heads; None for as many as query heads."""
    mlp_dim: int = 384
    """Width of the feed-forward layer."""
    max_len: int = 4096
    """Longest sequence, recorded in the checkpoint."""
    rope_theta: float = 500_000.0
    """Rotary base."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """The head is the transposed embedding."""
    init_std: float | None = None
    """Standard deviation of random weights (outputs into the residual stream: over sqrt(2 layers)); None for Mitchell's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute and activation type (softmax, norms and loss are float32 in any case)."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of the weights."""
    remat: Literal["none", "dots", "full", "offload"] = "none"
    """What the backward pass recomputes: nothing, all but matmuls, or whole layers; `offload` keeps the layers' inputs in
    the host's memory besides."""
    loss_chunk: int | None = None
    """Positions of a row whose logits are held at once (classical SFT needs those of all); None for all."""
    attention: Literal["auto", "xla", "splash", "cudnn", "reference"] = "auto"
    """Attention backend: `auto` takes the platform's (`splash` on TPU, `cudnn` on NVIDIA GPUs, `xla` on CPU; the first two
    for bfloat16 alone); `reference` is the plain oracle."""
    scan_layers: bool = True
    """Run layers by lax.scan (compiles once); False unrolls them (debugging, and faster on a CPU for few layers)."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: the weights stay as they are, and only the adapters are trained, saved and exported."""

    rank: int = 0
    """Rank of the adapters; 0 trains the whole network."""
    alpha: float = 16.0
    """The adapters' output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Chance that an input of an adapter is dropped in training."""
    targets: tuple[str, ...] = ("all",)
    """Adapted matrices: `all`, or some of q, k, v, o, gate, up, down (the same names for every family), or the
    checkpoint's own module names."""
    unmatched: Literal["error", "ignore"] = "error"
    """A target that matches no matrix: stop, or go on without it (the paper's names match 4 of 7 on LLaDA)."""

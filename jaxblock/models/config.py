"""The `model` and `lora` sections: where the network comes from and how it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxblock.settings import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, Alignment, Section, may_change, require, setting

Family = Literal["llada", "dream", "llama", "qwen2", "qwen3"]
Quantize = Literal["none", "int8"]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full", "offload"]
Backend = Literal["xla", "splash", "cudnn", "reference"]
Unmatched = Literal["error", "ignore"]
Checkpoint = Literal["latest", "best"] | int
"""Which checkpoint of a run: the newest, the best by its `train.keep_best`, or that of a step."""


@dataclass(frozen=True)
class ModelConfig(Section, name="model"):
    """Where the network comes from and how it runs; the sizes matter for a random start only."""

    init_from: str | None = setting(None, on_resume="may_change_once_saved")
    """A run folder, a Hugging Face folder or a hub id (`org/name`) to start from; None starts from random weights."""
    init_step: Checkpoint = setting("latest", on_resume="may_change_once_saved")
    """Which checkpoint of a run to start from: the newest, the best by its `train.keep_best`, or that of a step."""
    alignment: Alignment | None = None
    """Logit alignment of an autoregressive start (Llama, Qwen): `shifted` keeps its next-token skill, `same_position` is
    LLaDA's; None for `shifted`. The diffusion families have their own."""
    quantize: Quantize = "none"
    """Keep the layers' matrices in int8: half of bfloat16's memory. For the frozen base of LoRA only."""
    family: Family = "llada"
    """Architecture of a random start."""
    d_model: int = setting(128, AT_LEAST_1)
    """Width."""
    n_layers: int = setting(4, AT_LEAST_1)
    """Layers."""
    n_heads: int = setting(4, AT_LEAST_1)
    """Query heads."""
    n_kv_heads: int | None = setting(None, AT_LEAST_1)
    """Key/value heads; None for as many as query heads."""
    mlp_dim: int = setting(384, AT_LEAST_1)
    """Width of the feed-forward layer."""
    max_len: int = setting(4096, AT_LEAST_1)
    """Longest sequence, recorded in the checkpoint."""
    rope_theta: float = 500_000.0
    """Rotary base."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """The head is the transposed embedding."""
    init_std: float | None = None
    """Standard deviation of random weights (outputs into the residual stream: over sqrt(2 layers)); None for Mitchell's."""
    dtype: Dtype = "float32"
    """Compute and activation type (softmax, norms and loss are float32 in any case)."""
    param_dtype: Dtype = "float32"
    """Storage type of the weights."""
    remat: Remat = may_change("none")
    """What the backward pass recomputes: nothing, all but matmuls, or whole layers; `offload` keeps the layers' inputs in
    the host's memory besides."""
    loss_chunk: int | None = may_change(None, AT_LEAST_1)
    """Positions of a row whose logits are held at once (classical SFT needs those of all); None for all."""
    attention: Literal["auto", Backend] = may_change("auto")
    """Attention backend: `auto` takes the platform's (`splash` on TPU, `cudnn` on NVIDIA GPUs, `xla` on CPU; the first two
    for bfloat16 alone); `reference` is the plain oracle."""
    scan_layers: bool = may_change(True)
    """Run layers by lax.scan (compiles once); False unrolls them (debugging, and faster on a CPU for few layers)."""

    def check(self) -> None:
        """Raises UserError where a size cannot be, or the heads of a random start do not divide its width."""
        super().check()
        if self.init_from is not None:
            return
        require(
            self.init_step == "latest",
            f"model.init_step is {self.init_step}, but model.init_from, the run whose checkpoint it is, is not set",
        )
        require(
            self.d_model % self.n_heads == 0 and (self.d_model // self.n_heads) % 2 == 0,
            f"model.d_model {self.d_model} must split into model.n_heads {self.n_heads} heads of an even size",
        )
        kv_heads = self.n_kv_heads or self.n_heads
        require(
            self.n_heads % kv_heads == 0,
            f"model.n_heads {self.n_heads} must be a multiple of model.n_kv_heads {kv_heads}",
        )


@dataclass(frozen=True)
class LoraConfig(Section, name="lora"):
    """Low-rank adapters: the weights stay as they are, and only the adapters are trained, saved and exported."""

    rank: int = setting(0, NOT_NEGATIVE)
    """Rank of the adapters; 0 trains the whole network."""
    alpha: float = 16.0
    """The adapters' output is multiplied by alpha / rank."""
    dropout: float = setting(0.0, BELOW_1)
    """Chance that an input of an adapter is dropped in training."""
    targets: tuple[str, ...] = ("all",)
    """Adapted matrices: `all`, or some of q, k, v, o, gate, up, down (the same names for every family), or the
    checkpoint's own module names."""
    unmatched: Unmatched = "error"
    """A target that matches no matrix: stop, or go on without it (the paper's names match 4 of 7 on LLaDA)."""

    def check(self) -> None:
        """Raises UserError where adapters would have no effect or no matrix."""
        super().check()
        if self.rank:
            require(self.alpha > 0, f"lora.alpha is {self.alpha}: it must be above 0")
            require(bool(self.targets), "lora.targets is empty: name at least one matrix, or set lora.rank to 0")

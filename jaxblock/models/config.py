"""Defines the `model` and `lora` sections: where the network comes from, how it runs, and its adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxblock.settings import (
    ABOVE_0,
    AT_LEAST_1,
    BELOW_1,
    BETWEEN_0_AND_1,
    Alignment,
    Section,
    between,
    may_change,
    require,
    setting,
)

FamilyName = Literal["llada", "dream", "llama", "qwen2", "qwen3"]
Quantize = Literal["none", "int8"]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full", "offload"]
Backend = Literal["xla", "splash", "cudnn", "reference"]
Unmatched = Literal["error", "ignore"]
Checkpoint = Literal["latest", "best"] | int
"""Which checkpoint of a run: the newest, the best by its `train.keep_best`, or that of a step."""


@dataclass(frozen=True)
class ModelConfig(Section, name="model"):
    """Where the network comes from and how it runs; the sizes are used only for random weights."""

    init_from: str | None = setting(None, on_resume="may_change_once_saved", common=("train", "plan"))
    """The run folder, Hugging Face folder or hub id (`org/name`) to start from; None for random weights."""
    init_step: Checkpoint = setting("latest", on_resume="may_change_once_saved")
    """Which checkpoint of a run to start from: the newest, the best by its `train.keep_best`, or that of a step."""
    alignment: Alignment | None = None
    """The logit alignment of an autoregressive start (Llama, Qwen): `shifted` keeps its next-token skill, `same_position` is
    LLaDA's; None for `shifted`. The diffusion families have their own."""
    quantize: Quantize = setting("none", common=("plan",))
    """Whether the layers' matrices are kept in int8, at half of bfloat16's memory; only for the frozen base of LoRA."""
    family: FamilyName = "llada"
    """The architecture of random weights."""
    d_model: int = setting(128, between(1, 1 << 20))
    """The width of the residual stream."""
    n_layers: int = setting(4, between(1, 10_000))
    """The number of layers."""
    n_heads: int = setting(4, between(1, 1 << 16))
    """The number of query heads."""
    n_kv_heads: int | None = setting(None, between(1, 1 << 16))
    """The number of key/value heads; None for as many as query heads."""
    mlp_dim: int = setting(384, between(1, 1 << 22))
    """The width of the feed-forward layer."""
    max_len: int = setting(4096, AT_LEAST_1)
    """The longest sequence, which the checkpoint records."""
    rope_theta: float = setting(500_000.0, ABOVE_0)
    """The base of the rotary frequencies."""
    norm_eps: float = setting(1e-5, BETWEEN_0_AND_1)
    """The number added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Whether the output head is the transposed embedding."""
    init_std: float | None = setting(None, ABOVE_0)
    """The standard deviation of random weights (divided by sqrt(2 layers) for outputs into the residual stream); None for
    Mitchell's."""
    dtype: Dtype = "float32"
    """The type of computation and activations (softmax, norms and loss are float32 in any case)."""
    param_dtype: Dtype = setting("float32", common=("plan",))
    """The type in which weights are stored."""
    remat: Remat = may_change("none", common=("plan",))
    """What the backward pass recomputes: nothing, all but matmuls (`dots`), or whole layers (`full`); `offload` recomputes whole
    layers from inputs that it keeps in the host's memory."""
    loss_chunk: int | None = may_change(None, AT_LEAST_1)
    """The number of a row's positions whose logits are in memory at once, for classical SFT, which predicts many; None for all."""
    attention: Literal["auto", Backend] = may_change("auto")
    """The attention backend: `auto` takes the platform's (`splash` on TPU, `cudnn` on NVIDIA GPUs, `xla` on CPU; the first two
    only for bfloat16); `reference` is a plain softmax for tests."""
    scan_layers: Literal["auto", True, False] = may_change("auto")
    """Whether layers run by lax.scan, which compiles only one, or are unrolled, which is faster on a CPU; `auto` unrolls there if
    there are few and compiling takes less time than is won."""

    def check(self) -> None:
        """Raises UserError where a size is out of range, or the heads of a network with random weights do not divide its width."""
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
    """Low-rank adapters: the network's weights are frozen, and only the adapters are trained, saved and exported."""

    rank: int = setting(0, between(0, 1 << 16), common=("train", "plan"))
    """The rank of the adapters; 0 trains the whole network."""
    alpha: float = setting(16.0, ABOVE_0, common=("train",))
    """The adapters' output is multiplied by alpha / rank."""
    dropout: float = setting(0.0, BELOW_1)
    """The probability with which dropout drops each input of an adapter in training."""
    targets: tuple[str, ...] = ("all",)
    """The adapted matrices: `all`, or some of q, k, v, o, gate, up, down (the same names for every family), or the
    checkpoint's own module names."""
    unmatched: Unmatched = "error"
    """What to do about a target that matches no matrix: stop, or go on without it (the paper's names match 4 of 7 on LLaDA)."""

    def check(self) -> None:
        """Raises UserError where a value is out of range, or adapters would have no effect or no target."""
        super().check()
        if self.rank:
            require(bool(self.targets), "lora.targets is empty: name at least one matrix, or set lora.rank to 0")

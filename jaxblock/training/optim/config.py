"""The `optimizer` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Adafactor with a schedule and clipping (docs/optimizer.md)."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """`adafactor` keeps one number per row and column of a matrix instead of a second moment per weight."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "deepspeed_cosine"] = "cosine"
    """Decay after the warm-up, to `final_ratio` of the peak at the last step; `deepspeed_cosine` is DeepSpeed's WarmupCosineLR."""
    warmup_steps: int = 50
    """Updates of linear warm-up; update 0 has a learning rate above 0. (`deepspeed_cosine`: from `warmup_floor`, at least 2.)"""
    warmup: Literal["linear", "log"] = "linear"
    """`deepspeed_cosine`: shape of the warm-up. DeepSpeed's own default is `log`."""
    warmup_floor: float = 0.0
    """`deepspeed_cosine`: learning rate at the start of the warm-up, as a share of the peak."""
    scheduler_steps: Literal["before_update", "after_update"] = "before_update"
    """`deepspeed_cosine`: `after_update` is the order of DeepSpeed's engine: one update late, the first with a learning rate of 0."""
    final_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """Which parameters decay; `all` includes norms, as the peers' AdamW does."""
    b1: float = 0.9
    """First-moment decay; 0 keeps no first moment under `adafactor`."""
    b2: float = 0.95
    """Second-moment decay."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Clip the gradient's global norm; 0 for never."""
    ema: float = 0.0
    """Decay of a moving average of what is trained, which evaluations, `decode` and `export` then use; 0 for none."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """Storage of the moments: 8, 4 or 2 bytes a weight for AdamW's two."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How updated bfloat16 weights are rounded (float32 ones are not); to the nearest, small updates are lost."""

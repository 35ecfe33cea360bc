"""Defines the `optimizer` section: update rule, schedule, clipping and precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxblock.settings import ABOVE_0, BELOW_1, NOT_NEGATIVE, SHARE, Section, require, setting

Storage = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class OptimizerConfig(Section, name="optimizer"):
    """The optimizer, AdamW or Adafactor, with its schedule and clipping (docs/optimizer.md)."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """The update rule; `adafactor` keeps one number per row and column of a matrix instead of a second moment per weight."""
    lr: float = setting(1e-3, ABOVE_0, common=("train",))
    """The peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "deepspeed_cosine"] = setting("cosine", common=("train",))
    """The decay after the warm-up, to `final_ratio` of the peak at the last step; `deepspeed_cosine` is DeepSpeed's WarmupCosineLR."""
    warmup_steps: int = setting(50, NOT_NEGATIVE, common=("train",))
    """The number of warm-up updates; update 0 has a learning rate above 0. (`deepspeed_cosine`: from `warmup_floor`, at least 2.)"""
    warmup: Literal["linear", "log"] = "linear"
    """`deepspeed_cosine`: the shape of the warm-up; DeepSpeed's own default is `log`."""
    warmup_floor: float = setting(0.0, SHARE)
    """`deepspeed_cosine`: the learning rate at the start of the warm-up, as a share of the peak."""
    scheduler_steps: Literal["before_update", "after_update"] = "before_update"
    """`deepspeed_cosine`: `after_update` is DeepSpeed's order, whose schedule is one update late; update 0 then has a rate of 0."""
    final_ratio: float = setting(0.0, SHARE)
    """The learning rate at the end, as a share of the peak."""
    weight_decay: float = setting(0.0, NOT_NEGATIVE)
    """The decoupled weight decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """Which parameters decay; `all` includes norms, as PyTorch's AdamW does by default."""
    b1: float = setting(0.9, BELOW_1)
    """The decay of the first moment; 0 keeps no first moment under `adafactor`."""
    b2: float = setting(0.95, BELOW_1)
    """The decay of the second moment."""
    eps: float = setting(1e-8, ABOVE_0)
    """The number added to the root of the second moment."""
    clip_norm: float = setting(1.0, NOT_NEGATIVE)
    """The global norm to which gradients are clipped; 0 for no clipping."""
    ema: float = setting(0.0, BELOW_1)
    """The decay of a moving average of the trained weights, which evaluations, `decode` and `export` then use; 0 for none."""
    moments: Storage = "float32"
    """The type in which moments are stored; AdamW's two moments then take 8, 4 or 2 bytes per weight."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How updated bfloat16 weights are rounded (float32 ones are not); `nearest` loses small updates."""

    def check(self) -> None:
        """Raises UserError where a number is out of range, or a field is set that the schedule or the optimizer does not use."""
        super().check()
        for name, value, only in (
            ("warmup", self.warmup, "linear"),
            ("warmup_floor", self.warmup_floor, 0.0),
            ("scheduler_steps", self.scheduler_steps, "before_update"),
        ):
            require(
                self.schedule == "deepspeed_cosine" or value == only,
                f"optimizer.{name} is {value}, which only the schedule deepspeed_cosine knows: set it to {only}, or "
                f"optimizer.schedule ({self.schedule} now) to deepspeed_cosine",
            )
        require(
            self.name == "adamw" or self.b1 > 0 or self.moments == "float32",
            f"optimizer.moments is {self.moments}, but adafactor with b1 0 keeps no moments that it could apply to: "
            "set it to float32, or optimizer.b1 above 0",
        )

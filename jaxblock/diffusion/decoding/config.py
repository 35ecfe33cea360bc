"""Defines the `decode` section: the settings of the blockwise decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from jaxblock.settings import (
    ABOVE_0,
    ABOVE_0_TO_1,
    AT_LEAST_1,
    BETWEEN_0_AND_1,
    NOT_NEGATIVE,
    ROWS,
    TOKENS,
    Section,
    between,
    setting,
)

RuleName = Literal[
    "low_confidence", "random", "confidence_threshold", "factor", "maskgit_plus", "topk_margin", "entropy", "origin"
]
Quota = Literal["even", "dllm_linear", "dream"]
FactorRule = Literal["strict", "v1"]
CacheName = Literal["none", "prefix", "dual"]
Quirks = Literal["none", "fast_dllm"]
EosSuppression = Literal["none", "logits", "confidence"]


@dataclass(frozen=True)
class DecodeConfig(Section, name="decode", on_resume="may_change"):
    """How responses are decoded, block by block."""

    response_len: int | None = setting(None, TOKENS)
    """R: response positions of a row; None for `canvas.response_len`."""
    block: int | None = setting(None, TOKENS)
    """B: response positions of a block; None for `canvas.block`."""
    steps_per_block: int | None = setting(None, AT_LEAST_1, common=("decode", "chat", "evaluate", "harness"))
    """Decode steps of a block, at most its positions; None for one token per step. The rules `confidence_threshold` and `factor`
    take as many as they need."""
    rule: RuleName = setting("low_confidence", common=("decode", "chat", "evaluate", "harness"))
    """Which positions a step commits. A quota of them: the most confident by LLaDA's `low_confidence` or Dream's `maskgit_plus`,
    `topk_margin` or `entropy`, or `random` ones. Without a quota: `confidence_threshold`, `factor`, or Dream's `origin` (each
    position by chance)."""
    quota: Quota = "even"
    """How a block's masks are split over its steps: LLaDA's `even`, dllm's linear rounding, or Dream's time grid."""
    eps: float = setting(1e-3, BETWEEN_0_AND_1)
    """The end of Dream's time grid, for `quota` dream and `rule` origin."""
    threshold: float = setting(0.9, ABOVE_0_TO_1, common=("decode", "chat", "evaluate", "harness"))
    """`confidence_threshold`: commit every token of at least this confidence, and always the best one."""
    factor: float = setting(1.0, ABOVE_0)
    """`factor`: accept rank n while (n + 1)(1 - confidence) <= factor."""
    factor_rule: FactorRule = "strict"
    """`factor`: `strict` stops at the first failure; `v1` (Fast-dLLM's later code) accepts it where it is the last rank."""
    temperature: float = setting(0.0, between(0, 1000), common=("decode", "chat", "evaluate", "harness"))
    """The sampling temperature (Gumbel noise); 0 takes the most probable token."""
    top_p: float | None = setting(None, ABOVE_0_TO_1)
    """Draw from the most probable tokens up to the one with which their probabilities sum to more than this; None for all.
    Dream's rules also measure confidence only on these tokens."""
    top_k: int | None = setting(None, AT_LEAST_1)
    """Draw from this many most probable tokens (after `top_p`); None for all."""
    alg_temp: float = setting(0.0, between(0, 1000))
    """Draw the quota's positions without replacement from softmax(confidence / alg_temp); 0 takes the most confident."""
    cfg_scale: float = setting(0.0, between(0, 1000), common=("decode", "chat"))
    """Classifier-free guidance: un + (scale + 1)(cond - un); 0 for none."""
    cache: CacheName = setting("none", common=("decode", "chat", "evaluate", "harness"))
    """What a block's steps after the first compute: everything (`none`); the block and all after it (`prefix`) or the block
    alone (`dual`), with the keys and values of everything else as they were at the block's start (Fast-dLLM). Only `none` is
    exact."""
    quirks: Quirks = "none"
    """`fast_dllm`: with a cache and Dream's alignment, commit a block's first token alone in the block's first step and shift
    logits inside the computed part, as Fast-dLLM does; `none` computes the position before the block too."""
    eos_suppression: EosSuppression = "none"
    """Whether the end of a response is delayed: `logits` never commits the fill token, `confidence` ranks stop tokens last."""
    early_stop: bool = True
    """Whether a row stops after the block that holds its first stop token."""
    stop_ids: tuple[int, ...] | None = setting(None, NOT_NEGATIVE)
    """The tokens that end a response; None for the checkpoint's own (end of turn and end of sequence)."""
    fill_id: int | None = setting(None, NOT_NEGATIVE)
    """The token after a response's end; None for the checkpoint's end of sequence."""
    seed: int = setting(0, NOT_NEGATIVE, common=("decode", "chat"))
    """The seed of sampling; each prompt's random key also depends on its index."""
    batch_size: int = setting(64, ROWS, common=("decode", "evaluate", "harness", "plan"))
    """The number of prompts that are decoded together, and of responses whose NELBO is estimated together."""

    @property
    def passes(self) -> int:
        """The forward passes per decode step: 2 with guidance, which also runs the network with the prompt masked, else 1."""
        return 2 if self.cfg_scale else 1

    def steps(self, block: int) -> int:
        """Returns the decode steps of a block with ``block`` positions, for the rules that do not choose them (``Rule.pace``)."""
        return block if self.steps_per_block is None else self.steps_per_block

    def static(self, block: int) -> DecodeConfig:
        """Returns the settings that a compiled decoder depends on, with the defaults for all others.

        Sizes and special ids are in the layout, and the seed is an argument of the compiled function. Settings that differ only
        in these are equal here, so that a jitted function that takes them as a static argument is not compiled again.

        Args:
            block: positions of a block.
        """
        plain = DecodeConfig()
        return dataclasses.replace(
            self,
            steps_per_block=self.steps(block),
            response_len=plain.response_len,
            block=plain.block,
            stop_ids=plain.stop_ids,
            fill_id=plain.fill_id,
            seed=plain.seed,
            batch_size=plain.batch_size,
        )

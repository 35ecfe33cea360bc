"""The `canvas` and `method` sections: the canvas that training and decoding share, and the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxblock.errors import UserError

Context = Literal["aligned", "paper"]
Law = Literal["exact_count", "bernoulli", "stratified_count", "antithetic", "floored_bernoulli"]
Weighting = Literal["nelbo", "masked_mean", "uniform"]
Normalize = Literal["text_tokens", "supervised_tokens", "sequences", "sequence_mean", "blocks", "canvas_tokens"]
Blocks = Literal["per_sequence", "pairs"]


@dataclass(frozen=True)
class CanvasConfig:
    """The canvas that training and decoding share."""

    prompt_len: int = 64
    """Longest prompt in tokens."""
    response_len: int = 32
    """R: response positions, a multiple of `block`."""
    block: int = 8
    """B: response positions of a block."""
    context: Context = "aligned"
    """What surrounds the active block in training: the decoder's own view, or the published training script's."""
    total_len: int | None = None
    """`paper` context: canvas positions of prompt and response together, filled to the end; None for the sum of both."""
    suffix_window: int | None = None
    """Ablation: visible positions after the active block, in training and decoding alike; None for all."""


@dataclass(frozen=True)
class MethodConfig:
    """The objective: what is masked, and how its loss is weighed."""

    objective: Literal["blockwise", "classical"] = "blockwise"
    """`blockwise` supervises one active block a draw; `classical` masks tokens all over the response (LLaDA's SFT)."""
    law: Law = "exact_count"
    """How the masked set of a block is drawn (docs/method.md)."""
    weighting: Weighting = "nelbo"
    """Weight of a masked token: unbiased for the NELBO, 1 / masked tokens of the row (the paper's script), or 1."""
    normalize: Normalize = "text_tokens"
    """What the summed loss is divided by; every choice depends on the data alone, never on the draw."""
    blocks: Blocks = "per_sequence"
    """`per_sequence`: draw blocks of each sequence; `pairs`: an epoch visits every (example, block) pair once."""
    draws: int = 1
    """K: draws per sequence and step, by jax.vmap (`per_sequence`: distinct blocks; `pairs`: masks of one block)."""
    prefix_mask_rate: float = 0.0
    """Ablation: chance that a response token before the active block is masked (never the prompt)."""
    suffix_mask_prob: float = 1.0
    """Ablation: chance that a response token after the active block is masked."""

    @property
    def pairs(self) -> bool:
        """Whether the data name each row's active block; classical SFT has one block, so there a row is its whole sequence."""
        return self.objective == "blockwise" and self.blocks == "pairs"

    @property
    def masks_per_block(self) -> int:
        """Draws that share a block: antithetic draws come in pairs, and where the data name the block all draws share it."""
        if self.pairs:
            return self.draws
        return 2 if self.law == "antithetic" else 1

    @property
    def needs_noise(self) -> bool:
        """Whether the ablations mask tokens outside the active block by chance."""
        return self.prefix_mask_rate > 0 or self.suffix_mask_prob < 1


def check_blocks(response_len: int, block: int, section: str) -> None:
    """Raises UserError unless ``block`` divides ``response_len``; suggests the nearest sizes that do."""
    if response_len % block == 0:
        return
    divisors = [b for b in range(1, response_len + 1) if response_len % b == 0]
    near = min(divisors, key=lambda b: abs(b - block))
    up = -(-response_len // block) * block
    raise UserError(
        f"{section}.block {block} does not divide {section}.response_len {response_len}: "
        f"set block to {near} or response_len to {up}"
    )

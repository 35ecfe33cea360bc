"""Defines the `canvas` and `method` sections: the canvas that training and decoding share, and the objective.

Both are hashable: jitted functions take them as static arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxblock.errors import UserError
from jaxblock.settings import BELOW_1, NOT_NEGATIVE, PROBABILITY, TOKENS, Section, between, require, setting

Context = Literal["aligned", "paper"]
Law = Literal["exact_count", "bernoulli", "stratified_count", "antithetic", "floored_bernoulli"]
Weighting = Literal["nelbo", "masked_mean", "uniform"]
Normalize = Literal["text_tokens", "supervised_tokens", "sequences", "sequence_mean", "blocks", "canvas_tokens"]
Blocks = Literal["per_sequence", "pairs"]


@dataclass(frozen=True)
class CanvasConfig(Section, name="canvas"):
    """The canvas that training and decoding share."""

    prompt_len: int = setting(64, TOKENS, common=("prepare", "plan"))
    """The number of tokens of the longest prompt."""
    response_len: int = setting(32, TOKENS, common=("prepare", "plan"))
    """R: response positions of a row, a multiple of `block`."""
    block: int = setting(8, TOKENS, common=("prepare", "inspect", "train", "plan"))
    """B: response positions of a block."""
    context: Context = setting("aligned", common=("inspect",))
    """What the model sees around the active block in training: `aligned` shows what it sees when it decodes, `paper` what the
    published training script shows."""
    total_len: int | None = setting(None, between(2, 1 << 25))
    """`paper` context: canvas positions of prompt and response together, filled to the end; None for the sum of both."""
    suffix_window: int | None = setting(None, NOT_NEGATIVE)
    """Ablation: positions after the active block that the model sees, in training and decoding alike; None for all."""

    def check(self) -> None:
        """Raises UserError where a size is out of range, sizes do not fit together, or a field has no effect in this context."""
        super().check()
        require(
            self.block <= self.response_len,
            f"canvas.block {self.block} is longer than canvas.response_len {self.response_len}",
        )
        check_blocks(self.response_len, self.block, "canvas")
        require(
            self.total_len is None or self.context == "paper",
            "canvas.total_len is for the paper context: under aligned all R positions follow the prompt, whatever its "
            "length; leave it out",
        )
        require(
            self.suffix_window is None or self.context == "aligned",
            "canvas.suffix_window hides what the paper context shows after the response: "
            "set canvas.context to aligned, or suffix_window to null",
        )


def check_blocks(response_len: int, block: int, section: str) -> None:
    """Raises UserError unless ``block`` divides ``response_len``; names the nearest sizes that do."""
    if response_len % block == 0:
        return
    divisors = [b for b in range(1, response_len + 1) if response_len % b == 0]
    near = min(divisors, key=lambda b: abs(b - block))
    up = -(-response_len // block) * block
    raise UserError(
        f"{section}.block {block} does not divide {section}.response_len {response_len}: "
        f"set block to {near} or response_len to {up}"
    )


@dataclass(frozen=True)
class MethodConfig(Section, name="method"):
    """The objective: which tokens are masked, and how their losses are weighted."""

    objective: Literal["blockwise", "classical"] = setting("blockwise", common=("inspect", "train"))
    """`blockwise` supervises one active block per draw; `classical` masks tokens all over the response (LLaDA's SFT)."""
    law: Law = setting("exact_count", common=("inspect", "train"))
    """How the masked set of a block is drawn (docs/method.md)."""
    weighting: Weighting = "nelbo"
    """Weight of a masked token's loss: `nelbo` makes the sum unbiased for the NELBO, `masked_mean` is 1 / masked tokens of the row
    (the paper's script), `uniform` is 1."""
    normalize: Normalize = "text_tokens"
    """What the summed loss is divided by; every choice depends on the data alone, never on the draw."""
    blocks: Blocks = setting("per_sequence", common=("inspect",))
    """`per_sequence`: draw blocks of each sequence; `pairs`: an epoch visits every (example, block) pair once."""
    draws: int = setting(1, between(1, 1 << 16))
    """K: draws per sequence and step, by jax.vmap (`per_sequence`: distinct blocks; `pairs`: masks of one block)."""
    prefix_mask_rate: float = setting(0.0, PROBABILITY)
    """Ablation: chance that a response token before the active block is masked (prompt tokens: `prompt_mask_rate`)."""
    suffix_mask_prob: float = setting(1.0, PROBABILITY)
    """Ablation: chance that a response token after the active block is masked."""
    prompt_mask_rate: float = setting(0.0, PROBABILITY)
    """Ablation: chance that a prompt token is masked in training, anew for each draw; it never has a loss (SPG: 0.15)."""
    rate_floor: float = setting(0.0, BELOW_1)
    """Ablation: the least mask rate, t ~ U(rate_floor, 1); a law that draws a count draws none below this share of the positions."""

    @property
    def pairs(self) -> bool:
        """Whether the loader chooses each row's active block; classical SFT has one block, so its rows are whole sequences."""
        return self.objective == "blockwise" and self.blocks == "pairs"

    @property
    def masks_per_block(self) -> int:
        """The number of draws that share a block: all where the loader chooses the block, else 2 under `antithetic` and 1 otherwise."""
        if self.pairs:
            return self.draws
        return 2 if self.law == "antithetic" else 1

    @property
    def needs_noise(self) -> bool:
        """Whether the ablations mask tokens outside the active block by chance."""
        return self.prefix_mask_rate > 0 or self.suffix_mask_prob < 1 or self.prompt_mask_rate > 0

    def check(self) -> None:
        """Raises UserError where a rate is no probability, the number of antithetic draws is odd, or an ablation has no effect."""
        super().check()
        require(
            self.objective == "blockwise" or (self.prefix_mask_rate == 0 and self.suffix_mask_prob == 1),
            "method.prefix_mask_rate and method.suffix_mask_prob have no effect on classical SFT, whose one block is the whole response: "
            "leave them out",
        )
        require(
            self.rate_floor == 0 or self.law not in ("antithetic", "floored_bernoulli"),
            f"method.rate_floor has no place in law {self.law}: "
            + (
                "its draws come in pairs of a small and a large count; choose exact_count or stratified_count"
                if self.law == "antithetic"
                else "it has the floor of the published scripts, 0.001; choose bernoulli, which draws t ~ U(rate_floor, 1)"
            ),
        )
        require(
            self.law != "antithetic" or self.draws % 2 == 0,
            f"method.law antithetic draws in pairs: set method.draws to {self.draws + 1}",
        )
        require(
            self.objective == "blockwise" or self.draws <= self.masks_per_block,
            f"method.draws is {self.draws}, but classical SFT has one block, the whole response, so that more than "
            f"{self.masks_per_block} would be computed for nothing: set it to {self.masks_per_block}",
        )

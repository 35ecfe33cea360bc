"""The vocabulary of arrays that every room shares.

Letters in shapes (also the suffixes of local names): B rows of a batch, T canvas positions, R response positions,
A positions of the active block, K draws per sequence, N query heads, G key/value heads, H head dim, D embed,
F feed-forward, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jax import Array
from jaxtyping import Bool, Float, Int

Params = dict[str, Any]
"""A nested dict of arrays; every layer's tensors are stacked on axis 0."""

Alignment = Literal["same_position", "shifted"]
Context = Literal["aligned", "paper"]
Law = Literal["exact_count", "bernoulli", "stratified_count", "antithetic", "floored_bernoulli"]
Weighting = Literal["nelbo", "masked_mean", "uniform"]
Normalize = Literal["text_tokens", "supervised_tokens", "sequences", "sequence_mean", "blocks", "canvas_tokens"]
Blocks = Literal["per_sequence", "pairs"]
RuleName = Literal[
    "low_confidence", "random", "confidence_threshold", "factor", "maskgit_plus", "topk_margin", "entropy", "origin"
]
Quota = Literal["even", "dllm_linear", "dream"]
FactorRule = Literal["strict", "v1"]
EosSuppression = Literal["none", "logits", "confidence"]

DREAM_MEASURES = ("maskgit_plus", "topk_margin", "entropy")
"""Rules whose confidence is that of the distribution the token is drawn from: tempered, top-p and top-k applied."""
RANKED_BY_QUOTA = ("low_confidence", *DREAM_MEASURES)
"""Rules that commit the quota's number of most confident positions."""
TAKE_A_QUOTA = (*RANKED_BY_QUOTA, "random")
"""Rules that commit the quota's number of positions."""


class Layout(NamedTuple):
    """What is static about a canvas. Hashable: a jitted function may close over it or take it as a static argument.

    Attributes:
        response_len: R, the response positions of a row; a multiple of ``block`` under ``aligned``.
        block: B, response positions of one block (A, in array shapes).
        alignment: ``same_position``: the hidden state at i predicts token i. ``shifted``: the one at i - 1 does.
        context: ``aligned`` (the decoder's own view) or ``paper`` (the published training script's view).
        suffix_window: how many positions after the active block are visible; None means all of them.
        mask_id: the mask token.
        fill_id: fills the rest of the terminator's block (the end-of-sequence token).
        stop_ids: the tokens that end a response.
        total_len: under ``paper``: canvas positions T, prompt and response together; None for room for the longest of
            each.
    """

    response_len: int
    block: int
    alignment: Alignment
    context: Context
    suffix_window: int | None
    mask_id: int
    fill_id: int
    stop_ids: tuple[int, ...]
    total_len: int | None = None

    @property
    def n_blocks(self) -> int:
        """How many blocks the response canvas holds (the last may be short under ``paper``)."""
        return -(-self.response_len // self.block)


class Canvas(NamedTuple):
    """Prompts and responses of a batch, flush left: the prompt at 0, the response at ``prompt_len``.

    Attributes:
        ids: tokens; after ``length`` they are never seen.
        prompt_len: tokens of the prompt.
        length: visible positions, the prompt included.
        text_len: response tokens that are text, the terminator counted, the fill not.
        n_blocks: K_i, the blocks of this row that may be active.
        row_id: the row's index in the global batch (indexes the step's uniforms).
    """

    ids: Int[Array, "B T"]
    prompt_len: Int[Array, " B"]
    length: Int[Array, " B"]
    text_len: Int[Array, " B"]
    n_blocks: Int[Array, " B"]
    row_id: Int[Array, " B"]


class Draw(NamedTuple):
    """One active block per row, the positions masked in it, and the weight of each masked token's loss."""

    block: Int[Array, " B"]
    masked: Bool[Array, "B A"]
    weight: Float[Array, " B"]


class View(NamedTuple):
    """What the network is fed, in training and in decoding alike.

    Attributes:
        ids: tokens with masks in place.
        positions: rotary positions.
        length: keys at or after it are hidden.
        active: canvas positions of the active block.
        at: where the hidden state that predicts each active position is read (the Dream shift lives here alone).
        valid: which active positions exist and may be supervised or committed.
    """

    ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    length: Int[Array, " B"]
    active: Int[Array, "B A"]
    at: Int[Array, "B A"]
    valid: Bool[Array, "B A"]


class Scores(NamedTuple):
    """What a transfer rule chooses from.

    Attributes:
        token: the token each position would be given.
        surprise: smaller is more confident: -log of the rule's confidence, in nats (probabilities near 1 tie in
            float32; this does not), or what the rule ranks by in its place (``scoring.score``).
        eligible: still a mask, inside the active block.
    """

    token: Int[Array, "B A"]
    surprise: Float[Array, "B A"]
    eligible: Bool[Array, "B A"]


class StepInfo(NamedTuple):
    """Where a decode step stands: its index inside the block, and the masks each row had when the block began."""

    step: Int[Array, ""]
    masks_at_start: Int[Array, " B"]


Rule = Callable[[Scores, StepInfo], Bool[Array, "B A"]]
"""A transfer rule: which eligible positions this step commits."""


class Carry(NamedTuple):
    """The decoder's state between blocks.

    Attributes:
        ids: the canvas as committed so far; what is not committed is a mask.
        commit_step: the step, counted over the whole response, that committed each response position; -1 = still mask.
        done: rows that stopped early.
        nfe: forward passes spent on each row.
        row_key: one random key a row, so that a row's result does not depend on its batch.
        cache: the cache policy's state; None without a cache.
    """

    ids: Int[Array, "B T"]
    commit_step: Int[Array, "B R"]
    done: Bool[Array, " B"]
    nfe: Int[Array, " B"]
    row_key: Array
    cache: Any


class Sum(NamedTuple):
    """A total and what to divide it by. Nothing is divided before the sink: never a mean of means."""

    total: Array
    weight: Array


@runtime_checkable
class Network(Protocol):
    """What the method asks of a network: hidden states at chosen positions, and the head applied to those alone."""

    def hidden(
        self, params: Params, view: View, cache: Any = None, row_keys: Array | None = None
    ) -> tuple[Float[Array, "B A D"], Any]:
        """Hidden states at ``view.at``, after the last norm; ``row_keys`` [B] are those of dropout (None: no dropout)."""
        ...

    def logits(self, params: Params, hidden: Float[Array, "B A D"]) -> Float[Array, "B A V"]:
        """float32 logits of hidden states."""
        ...

    def nll(self, params: Params, hidden: Float[Array, "B A D"], targets: Int[Array, "B A"]) -> Float[Array, "B A"]:
        """float32 negative log-likelihoods of targets, in nats; the mask token stays in the normaliser."""
        ...

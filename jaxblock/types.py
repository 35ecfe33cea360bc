"""The types of arrays that several rooms share.

Letters in shapes (also the suffixes of local names): B rows of a batch, T canvas positions, R response positions,
A positions of the active block, K draws per sequence, N query heads, G key/value heads, H head dim, D embed,
F feed-forward, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jax import Array
from jaxtyping import Bool, Float, Int

Params = dict[str, Any]
"""A nested dict of arrays; every layer's tensors are stacked on axis 0."""


class View(NamedTuple):
    """What the network sees of a batch, in training and in decoding alike.

    Attributes:
        ids: the tokens of the canvas, with mask tokens where something is hidden.
        positions: the rotary position of each token.
        length: the visible positions of each row; keys at or after it are hidden.
        active: the canvas positions of the active block.
        at: the position whose hidden state predicts each active position (the only place of Dream's shift).
        valid: which active positions exist and may be supervised or committed.
    """

    ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    length: Int[Array, " B"]
    active: Int[Array, "B A"]
    at: Int[Array, "B A"]
    valid: Bool[Array, "B A"]


class Sum(NamedTuple):
    """A total and what it will be divided by, where it is written down and not before: a mean of means would be wrong."""

    total: Array
    weight: Array


@runtime_checkable
class Network(Protocol):
    """What the method needs of a network: hidden states at chosen positions, and the head applied to those alone."""

    def hidden(self, params: Params, view: View, row_keys: Array | None = None) -> Float[Array, "B A D"]:
        """Returns the hidden states at ``view.at`` after the last norm; ``row_keys`` [B] draw the dropout, None is no dropout."""
        ...

    def logits(self, params: Params, hidden: Float[Array, "B A D"]) -> Float[Array, "B A V"]:
        """Returns the float32 logits of hidden states."""
        ...

    def nll(self, params: Params, hidden: Float[Array, "B A D"], targets: Int[Array, "B A"]) -> Float[Array, "B A"]:
        """Returns the float32 -log p of the targets in nats; the mask token counts in the normaliser."""
        ...

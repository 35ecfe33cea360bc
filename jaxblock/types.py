"""The vocabulary of arrays that every room shares.

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


class Sum(NamedTuple):
    """A total and what to divide it by. Nothing is divided before the sink: never a mean of means."""

    total: Array
    weight: Array


@runtime_checkable
class Network(Protocol):
    """What the method asks of a network: hidden states at chosen positions, and the head applied to those alone."""

    def hidden(self, params: Params, view: View, row_keys: Array | None = None) -> Float[Array, "B A D"]:
        """Hidden states at ``view.at``, after the last norm; ``row_keys`` [B] are those of dropout (None: no dropout)."""
        ...

    def logits(self, params: Params, hidden: Float[Array, "B A D"]) -> Float[Array, "B A V"]:
        """float32 logits of hidden states."""
        ...

    def nll(self, params: Params, hidden: Float[Array, "B A D"], targets: Int[Array, "B A"]) -> Float[Array, "B A"]:
        """float32 negative log-likelihoods of targets, in nats; the mask token stays in the normaliser."""
        ...

"""Defines the types of arrays, and the interface of a network, that several packages share.

Letters in shapes (also the suffixes of local names): B rows of a batch, T canvas positions, R response positions,
A positions of the active block, Q positions computed beside a cache, K draws per sequence, N query heads, G key/value heads,
H head dim, D embed, F feed-forward, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jax import Array
from jaxtyping import Bool, Float, Int

Params = dict[str, Any]
"""A nested dict of arrays; every layer's tensors are stacked on axis 0."""


Places = tuple[tuple[int, int], ...]
"""The places of a line, in which rows of several widths lie side by side: (number of places, width), the widest first."""


class Lines(NamedTuple):
    """Says at which widths a train step computes its rows. Static and hashable.

    Attributes:
        places: the places of a line.
        widest: the width of every row where the rows of a batch do not all fit their places; any row fits in it.
    """

    places: Places
    widest: int


def rows_of_line(places: Places) -> int:
    """Returns the number of rows that a line has places for."""
    return sum(count for count, _ in places)


def positions_of_line(places: Places) -> int:
    """Returns the number of positions of a line."""
    return sum(count * width for count, width in places)


class View(NamedTuple):
    """Describes what the network sees of a batch, in training and in decoding alike.

    Attributes:
        ids: the tokens of the canvas, with mask tokens where something is hidden.
        positions: the rotary position of each token.
        length: the number of visible positions of each row; keys at or after it are hidden.
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


class Part(NamedTuple):
    """Describes the consecutive positions of a ``View`` that a pass on cached keys and values computes anew.

    Attributes:
        ids: the tokens at these positions; Q is the same for all rows.
        first: the canvas position of the first of them; positions past the canvas are ignored.
        length: the number of visible canvas positions of each row.
        at: the index among them whose hidden state predicts each active position.
    """

    ids: Int[Array, "B Q"]
    first: Int[Array, " B"]
    length: Int[Array, " B"]
    at: Int[Array, "B A"]


class KeysValues(NamedTuple):
    """Holds the rotated keys and the values of canvas positions, of one layer or of all layers stacked.

    They are [B, T, G, H] where they are computed. Those of a cache lie as the attention backend reads them (``beside.keep``).
    """

    k: Float[Array, "*layers B _ _ _"]
    v: Float[Array, "*layers B _ _ _"]


Cache = KeysValues | tuple[KeysValues, ...]
"""The keys and values of all layers: stacked where layers are scanned, else one by one."""


class Sum(NamedTuple):
    """Holds a sum and its weight. They are divided only when the value is written, because a mean of means would be wrong."""

    total: Array
    weight: Array


@runtime_checkable
class Network(Protocol):
    """Declares what the method needs of a network: hidden states at chosen positions, and the head applied only to those."""

    def unstacked(self, params: Params) -> Params:
        """Returns the parameters in the form that a loop over passes should hold: what a pass would copy is copied here."""
        ...

    def hidden(self, params: Params, view: View, row_keys: Array | None = None) -> Float[Array, "B A D"]:
        """Returns the hidden states at ``view.at`` after the last norm; dropout uses the keys ``row_keys`` [B], None turns it off."""
        ...

    def logits(self, params: Params, hidden: Float[Array, "B A D"]) -> Float[Array, "B A V"]:
        """Returns the float32 logits of hidden states."""
        ...

    def nll(self, params: Params, hidden: Float[Array, "B A D"], targets: Int[Array, "B A"]) -> Float[Array, "B A"]:
        """Returns the float32 -log p of the targets in nats; the mask token counts in the normaliser."""
        ...


@runtime_checkable
class CachingNetwork(Network, Protocol):
    """Declares what decoding with a cache needs besides."""

    def refresh(self, params: Params, view: View) -> tuple[Float[Array, "B A D"], Cache]:
        """Returns the hidden states at ``view.at`` (as ``hidden`` does), and the keys and values of all positions."""
        ...

    def update(self, params: Params, part: Part, cache: Cache) -> Float[Array, "B A D"]:
        """Returns the hidden states at ``part.at``, computing only the part anew; its keys and values stand in for the cached ones."""
        ...

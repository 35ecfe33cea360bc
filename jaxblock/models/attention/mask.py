"""Defines the attention mask, from which every backend gets the form that it needs.

Every query of a row sees all visible positions of its canvas, so the mask is just the number of visible keys. Only the
reference backend makes a dense matrix of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from jaxblock.types import Places

MaskKind = Literal["bidirectional", "causal"]
"""``bidirectional``: every query sees all visible keys of its row. ``causal``: a query does not see keys after its own
position, as in the training of an autoregressive checkpoint; queries and keys are then the same positions."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Says which keys a query sees. A pytree; its kind is static.

    Attributes:
        length: the number of visible keys of each row, at least 1; keys at or after it are hidden.
        kind: what else is hidden.
        places: where rows of several widths lie side by side in lines, the places of a line; () where each row is by itself.
    """

    length: Int[Array, " B"]
    kind: MaskKind = field(default="bidirectional", metadata={"static": True})
    places: Places = field(default=(), metadata={"static": True})

    def visible_keys(self, n_keys: int) -> Bool[Array, "B S"]:
        """Returns which keys of each row are visible at all."""
        return jnp.arange(n_keys) < self.length[:, None]

    def dense(self, n_queries: int, n_keys: int) -> Bool[Array, "B T S"]:
        """Returns which keys each query sees, as a matrix for each row."""
        visible = jnp.broadcast_to(self.visible_keys(n_keys)[:, None, :], (self.length.shape[0], n_queries, n_keys))
        return visible & jnp.tril(jnp.ones((n_queries, n_keys), bool)) if self.kind == "causal" else visible

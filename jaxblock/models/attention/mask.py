"""The attention mask as one value, which every backend asks for the form that it needs.

A row has one active block and sees all of its canvas before its end, so the mask is only a number of visible keys; none
but the reference backend makes a dense matrix of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

MaskKind = Literal["bidirectional", "causal"]
"""``bidirectional``: every query sees all visible keys of its row. ``causal``: it does not see those after itself, as an
autoregressive checkpoint was trained; queries and keys are then the same positions."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Says which keys a query sees. A pytree; its kind is static.

    Attributes:
        length: the number of visible keys of each row, at least 1; keys at or after it are hidden.
        kind: what else is hidden.
    """

    length: Int[Array, " B"]
    kind: MaskKind = field(default="bidirectional", metadata={"static": True})

    def visible_keys(self, n_keys: int) -> Bool[Array, "B S"]:
        """Returns which keys of each row are visible at all."""
        return jnp.arange(n_keys) < self.length[:, None]

    def dense(self, n_queries: int, n_keys: int) -> Bool[Array, "B T S"]:
        """Returns which keys each query sees, as a matrix for each row."""
        visible = jnp.broadcast_to(self.visible_keys(n_keys)[:, None, :], (self.length.shape[0], n_queries, n_keys))
        return visible & jnp.tril(jnp.ones((n_queries, n_keys), bool)) if self.kind == "causal" else visible

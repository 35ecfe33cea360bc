"""What the sections of a config are made of."""

from __future__ import annotations

from typing import Literal

Alignment = Literal["same_position", "shifted"]
"""Which hidden state predicts the token at position i: the one at i, or the one at i - 1 (as in an autoregressive model)."""

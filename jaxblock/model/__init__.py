"""Defines ``Model``, a network with its weights: it computes logits, decodes, estimates the NELBO and saves.

It is a thin layer over pure functions; the command line uses it too.
"""

from __future__ import annotations

import dataclasses

from jaxblock.model.answering import Answer, Decoded
from jaxblock.model.exporting import Exporting
from jaxblock.model.filling import Filling

__all__ = ["Answer", "Decoded", "Model"]


@dataclasses.dataclass(frozen=True, repr=False)
class Model(Filling, Exporting):
    """DOC"""

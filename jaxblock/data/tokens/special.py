"""Defines the special tokens that the method needs, and finds where a response ends."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialIds:
    """Holds the ids of the special tokens that the method needs.

    Attributes:
        mask: The id of the mask token.
        eos: The id of the end-of-sequence token, which fills the rest of the terminator's block.
        eot: The id of the end-of-turn token, which ends a response.
        pad: The id of the padding token: the tokenizer's own, else `eos`. The model never sees padding.
    """

    mask: int
    eos: int
    eot: int
    pad: int

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a response, without repetition."""
        return (self.eot,) if self.eot == self.eos else (self.eot, self.eos)


def first_stop(ids: Iterable[int], stop_ids: Collection[int]) -> int | None:
    """Returns the position of the first token that ends a response; None if no token does.

    With either result `ids[:first_stop(ids, stop_ids)]` is the response without its terminator.

    Args:
        ids: The tokens of a response.
        stop_ids: The ids that end a response.
    """
    return next((at for at, token in enumerate(ids) if token in stop_ids), None)

"""The ids of the special tokens that the method needs, and where they end a response."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialIds:
    """The ids of the tokens that the method needs.

    Attributes:
        mask: The id of the mask token.
        eos: The id of the end of the sequence, which fills the rest of the terminator's block.
        eot: The id of the end of a turn, which ends a response.
        pad: The id of padding: the tokenizer's own, else `eos`. Nothing that the model sees is padded.
    """

    mask: int
    eos: int
    eot: int
    pad: int

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a response, each once."""
        return (self.eot,) if self.eot == self.eos else (self.eot, self.eos)


def first_stop(ids: Iterable[int], stop_ids: Collection[int]) -> int | None:
    """Returns the position of the first token that ends a response; None if no token does.

    In both cases `ids[:first_stop(ids, stop_ids)]` is the response's text without its terminator.

    Args:
        ids: The tokens of a response.
        stop_ids: The ids that end a response.
    """
    return next((at for at, token in enumerate(ids) if token in stop_ids), None)

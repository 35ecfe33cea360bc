"""Defines the special tokens that the method needs, and finds where a response ends."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SpecialIds:
    """Holds the ids of the special tokens that the method needs.

    Attributes:
        mask: The id of the mask token.
        eos: The id of the end-of-sequence token, which fills the rest of the terminator's block.
        eot: The id of the end-of-turn token, which ends a response.
        pad: The id of the padding token: the tokenizer's own, else `eos`. The model never sees padding.
        ends: Further ids that end a response, from config.json and generation_config.json of the checkpoint; None in a folder
            of an earlier version, which did not record them.
    """

    mask: int
    eos: int
    eot: int
    pad: int
    ends: tuple[int, ...] | None = ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a response, without repetition."""
        return tuple(dict.fromkeys((self.eot, self.eos, *(self.ends or ()))))


def special_from_json(values: Mapping[str, Any]) -> SpecialIds:
    """Reads special ids from a manifest or an export; one of an earlier version has no `ends`.

    Raises:
        TypeError: If an id is missing or is no number, or there is another.
    """
    ends = values.get("ends")
    if not all(isinstance(value, int) for value in [*(ends or ()), *(values[key] for key in values if key != "ends")]):
        raise TypeError("a special id is no number")
    return SpecialIds(**{**values, "ends": None if ends is None else tuple(ends)})


def first_stop(ids: Iterable[int], stop_ids: Collection[int]) -> int | None:
    """Returns the position of the first token that ends a response; None if no token does.

    With either result `ids[:first_stop(ids, stop_ids)]` is the response without its terminator.

    Args:
        ids: The tokens of a response.
        stop_ids: The ids that end a response.
    """
    return next((at for at, token in enumerate(ids) if token in stop_ids), None)

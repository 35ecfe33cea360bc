"""Helps to read and write config.json: the parts that the readers and writers of all families share."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from jaxblock.errors import UserError, shown

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}
"""Fields of any family that change what a network computes, with the only value that each may have."""


MOST_LAYERS = 10_000
"""More layers are refused at once: listing the tensors of billions of them would take hours."""


class Fields:
    """Reads the fields of a parsed config.json, with errors that name the file and the field."""

    def __init__(self, config: Mapping[str, Any], where: str, family: str) -> None:
        """Wraps a parsed config.json.

        Args:
            config: the parsed file.
            where: the file's path, for messages.
            family: the family's name, for messages.
        """
        self._config, self._where, self._family = config, where, family

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field, or the default where it is absent or null."""
        value = self._config.get(name)
        return default if value is None else value

    def names(self, name: str) -> bool:
        """Returns whether the file names a field, be it with null."""
        return name in self._config

    def nested(self, name: str) -> Fields:
        """Returns the fields of a field that must be a JSON object.

        Raises:
            UserError: the field is something else.
        """
        value = self.need(name)
        if not isinstance(value, dict):
            raise self.error(f"{name} is {shown(value)}; it must be a JSON object")
        return Fields(value, f"{self._where}: {name}", self._family)

    def need(self, name: str) -> Any:
        """Returns a field that must be there.

        Raises:
            UserError: the field is absent or null.
        """
        if self._config.get(name) is None:
            raise UserError(f"{self._where}: field {name!r} is missing; a {self._family} config must have it")
        return self._config[name]

    def size(self, name: str, default: int | None = None, most: int = 1 << 40) -> int:
        """Returns a field that must be a whole number from 1 to ``most``.

        Raises:
            UserError: the field is something else, or absent without a default.
        """
        value = self.need(name) if default is None else self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.error(f"{name} is {shown(value)}; it must be a whole number above 0, and at most {most:,}")
        return value

    def number(self, name: str, default: float, *, zero: bool = False) -> float:
        """Returns a field that must be a finite number above 0, or with ``zero`` one that may be 0.

        Raises:
            UserError: the field is something else.
        """
        return self._positive(name, self.get(name, default), zero=zero)

    def _positive(self, name: str, value: Any, *, zero: bool = False) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not number or not (value > 0 or zero and value == 0):  # comparisons with NaN are false
            raise self.error(f"{name} is {shown(value)}; it must be a finite number above 0")
        return float(value)

    def needed_number(self, name: str) -> float:
        """Returns a field that must be there and a finite number above 0.

        Raises:
            UserError: the field is absent or something else.
        """
        return self._positive(name, self.need(name))

    def flag(self, name: str, default: bool = False) -> bool:
        """Returns a field that must be true or false.

        Raises:
            UserError: the field is something else.
        """
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name} is {shown(value)}; it must be true or false")
        return value

    def check_heads(self, d_model: int, n_heads: int, n_kv_heads: int, head_dim: int | None = None) -> None:
        """Checks the sizes of heads, which the shapes of tensors do not show.

        Args:
            d_model: the width of the residual stream.
            n_heads: the number of query heads.
            n_kv_heads: the number of key and value heads.
            head_dim: the width of a head where the file names it; None where it is d_model / n_heads.

        Raises:
            UserError: the numbers of heads or the widths do not divide, or a head's size is odd, so that it cannot be rotated.
        """
        if n_heads % n_kv_heads:
            raise self.error(f"{n_heads} query heads are no multiple of {n_kv_heads} key and value heads")
        if head_dim is None and d_model % n_heads:
            raise self.error(f"a width of {d_model} does not split into {n_heads} heads")
        if (head_dim or d_model // n_heads) % 2:
            raise self.error(
                f"heads of {head_dim or d_model // n_heads} dimensions: rotary positions need an even size"
            )

    def check_fixed(self, fixed: Mapping[str, tuple[Any, ...]]) -> None:
        """Checks the fields for which only some values are supported.

        Args:
            fixed: the supported values of each field; an absent field means one of them.

        Raises:
            UserError: a field has another value.
        """
        for name, allowed in fixed.items():
            if self._config.get(name) is not None and self._config[name] not in allowed:
                raise self.error(f"{name} is {shown(self._config[name])}; this reader supports {allowed[0]!r} only")

    def error(self, what: str) -> UserError:
        """Makes an error whose message names this file."""
        return UserError(f"{self._where}: {what}")

    def token(self, name: str, vocab_size: int, default: int | None = None) -> int | None:
        """Returns the special token that a field names; the first one if it names several.

        Raises:
            UserError: the field is no token's id, or one outside the vocabulary.
        """
        ids = self.tokens(name, vocab_size)
        return ids[0] if ids else default

    def need_token(self, name: str, vocab_size: int) -> int:
        """Returns the special token that a field must name; the first one if it names several.

        Raises:
            UserError: the field is absent, no token's id, or one outside the vocabulary.
        """
        self.need(name)
        ids = self.tokens(name, vocab_size)
        if not ids:
            raise self.error(f"{name} is an empty list or -1; it must be a token's id")
        return ids[0]

    def tokens(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Returns all special tokens that a field names: none, one or a list; -1 stands for none.

        Raises:
            UserError: one of them is no token's id, or outside the vocabulary.
        """
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for one in ids:
            if not isinstance(one, int) or isinstance(one, bool):
                raise self.error(f"{name} is {shown(value)}; it must be a token's id")
            if not -1 <= one < vocab_size:
                raise self.error(f"{name} is {one}, outside the vocabulary of {vocab_size} (ids 0 to {vocab_size - 1})")
        return tuple(one for one in ids if one != -1)

    def kept(self) -> tuple[tuple[str, str], ...]:
        """Returns all fields as JSON, so that an export can write back those that we do not use."""
        return tuple(sorted((key, json.dumps(value)) for key, value in self._config.items()))

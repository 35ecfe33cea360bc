"""Helps to read and write config.json: the parts that the readers and writers of all families share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxblock.errors import UserError
from jaxblock.models.architecture import Architecture, RopeScaling


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

    def need(self, name: str) -> Any:
        """Returns a field that must be there.

        Raises:
            UserError: the field is absent or null.
        """
        if self._config.get(name) is None:
            raise UserError(f"{self._where}: field {name!r} is missing; a {self._family} config must have it")
        return self._config[name]

    def size(self, name: str, default: int | None = None) -> int:
        """Returns a field that must be a whole number above 0.

        Raises:
            UserError: the field is something else, or absent without a default.
        """
        value = self.need(name) if default is None else self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self._where}: {name} is {value!r}; it must be a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        """Returns a field that must be a number above 0.

        Raises:
            UserError: the field is something else.
        """
        return self._positive(name, self.get(name, default))

    def _positive(self, name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(f"{name} is {value!r}; it must be a number above 0")
        return float(value)

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
                raise self.error(f"{name} is {self._config[name]!r}; this reader supports {allowed[0]!r} only")

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
            raise self.error(f"{name} is an empty list; it must be a token's id")
        return ids[0]

    def tokens(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Returns all special tokens that a field names: none, one or a list.

        Raises:
            UserError: one of them is no token's id, or outside the vocabulary.
        """
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for one in ids:
            if not isinstance(one, int) or isinstance(one, bool):
                raise self.error(f"{name} is {value!r}; it must be a token's id")
            if not 0 <= one < vocab_size:
                raise self.error(f"{name} is {one}, outside the vocabulary of {vocab_size} (ids 0 to {vocab_size - 1})")
        return tuple(ids)

    def rope_theta(self) -> float:
        """Returns the base of the rotary frequencies, from the top level or from ``rope_parameters``.

        Raises:
            UserError: the base is no number above 0, or ``rope_parameters`` is no JSON object.
        """
        nested = self.get("rope_parameters", {})
        if not isinstance(nested, dict):
            raise self.error(f"rope_parameters is {nested!r}; it must be a JSON object")
        return self._positive("rope_theta", self.get("rope_theta", nested.get("rope_theta") or 10_000.0))

    def rope_scaling(self) -> RopeScaling | None:
        """Returns how rotary frequencies are stretched, from ``rope_scaling`` or ``rope_parameters``.

        Raises:
            UserError: the network does not compute this kind, or the field lacks its numbers.
        """
        scaling = self.get("rope_scaling") or self.get("rope_parameters", {})
        try:
            kind = scaling.get("rope_type") or scaling.get("type") or "default"
            if kind == "default":
                return None
            if kind == "linear":
                return RopeScaling("linear", float(scaling["factor"]))
            if kind == "llama3":
                low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
                original = int(scaling["original_max_position_embeddings"])
                return RopeScaling("llama3", float(scaling["factor"]), low, high, original)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.error(f"rope_scaling cannot be read: {scaling!r} ({type(error).__name__}: {error})") from error
        raise self.error(f"rope_scaling of type {kind!r} is not supported (only default, linear and llama3 are)")

    def kept(self) -> tuple[tuple[str, str], ...]:
        """Returns all fields as JSON, so that an export can write back those that we do not use."""
        return tuple(sorted((key, json.dumps(value)) for key, value in self._config.items()))


def add_rope_and_dtype(config: dict[str, Any], arch: Architecture, dtype: str) -> dict[str, Any]:
    """Adds rotary frequencies and the tensors' type to a config, under the names of the transformers version (4 or 5) it is from."""
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and "rope_theta" in nested:
        config["rope_parameters"] = {**nested, "rope_theta": arch.rope_theta}
    else:
        nested = {}
        config["rope_theta"] = arch.rope_theta
    scaling = arch.rope_scaling
    if scaling is not None and not config.get("rope_scaling") and "factor" not in nested:
        config["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            config["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_len,
            }
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return config

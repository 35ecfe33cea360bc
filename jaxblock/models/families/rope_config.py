"""Reads and writes how config.json describes rotary positions, which transformers 4 and 5 spell differently."""

from __future__ import annotations

import math
from typing import Any, get_args

from jaxblock.errors import shown
from jaxblock.models.architecture import Architecture, RopeKind, RopeScaling
from jaxblock.models.families.config_json import Fields

_OF_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


def read_rope_theta(fields: Fields) -> float:
    """Returns the base of the rotary frequencies, from the top level, ``rope_scaling`` or ``rope_parameters``.

    Raises:
        UserError: the base is no number above 0, or two of the three places give different ones.
    """
    places = [fields, *_objects(fields)]
    bases = {place.needed_number("rope_theta") for place in places if place.get("rope_theta") is not None}
    if len(bases) > 1:
        raise fields.error(f"rope_theta is {' and '.join(map(str, sorted(bases)))}; leave only the right one")
    return bases.pop() if bases else 10_000.0


def read_rope_scaling(fields: Fields, max_len: int) -> RopeScaling | None:
    """Returns how rotary frequencies are scaled, from ``rope_scaling`` (transformers 4) or ``rope_parameters`` (5).

    Args:
        fields: the fields of config.json.
        max_len: the longest sequence that the network was made for.

    Raises:
        UserError: the network does not compute this kind, a number is missing or wrong, or the two fields differ.
    """
    found = {_scaling(rope, max_len) for rope in _objects(fields)}
    _check_original_length(fields)
    if len(found) > 1:
        raise fields.error("rope_scaling and rope_parameters differ; leave only the right one")
    scaling = found.pop() if found else None
    if scaling is not None and scaling.kind == "yarn" and read_rope_theta(fields) == 1:
        raise fields.error("rope_theta is 1, with which yarn's frequencies are not defined")
    return scaling


def _check_original_length(fields: Fields) -> None:
    """Raises UserError where the top level gives another original length than the description of rotary positions.

    transformers takes the former, where there is one.
    """
    name = "original_max_position_embeddings"
    if fields.get(name) is None:
        return
    for rope in _objects(fields):
        kind = rope.get("rope_type") or rope.get("type")
        if kind in ("llama3", "yarn") and rope.get(name) != fields.get(name):
            there = shown(rope.get(name))
            raise fields.error(
                f"{name} is {shown(fields.get(name))} here and {there} beside the type {shown(kind)}; write the right one in both"
            )


def _objects(fields: Fields) -> list[Fields]:
    """Returns the JSON objects that describe rotary positions, where they are there."""
    return [fields.nested(name) for name in ("rope_scaling", "rope_parameters") if fields.get(name)]


def _scaling(rope: Fields, max_len: int) -> RopeScaling | None:
    for layers in _OF_LAYERS:
        if rope.get(layers) is not None:
            raise rope.error(f"{layers} has its own rotary positions; only one form for all layers is supported")
    rope.check_fixed({"partial_rotary_factor": (1,)})
    names = [rope.get(name) for name in ("rope_type", "type") if rope.get(name) is not None] or ["default"]
    if names[0] != names[-1]:
        raise rope.error(f"rope_type is {shown(names[0])}, but type is {shown(names[1])}; leave only the right one")
    kind = names[0]
    if kind == "default":
        if rope.get("factor") not in (None, 1):
            raise rope.error(
                f"factor is {shown(rope.get('factor'))}, but there is no type (rope_type) that says what it scales"
            )
        return None
    if kind not in get_args(RopeKind):
        known = ", ".join(get_args(RopeKind))
        raise rope.error(f"the type {shown(kind)} is not supported (only default, {known} are)")
    scaling = RopeScaling(kind, rope.needed_number("factor"))
    if kind == "linear":
        return scaling
    if kind == "dynamic":
        return scaling._replace(original_len=max_len)
    if kind == "llama3":
        low, high = rope.needed_number("low_freq_factor"), rope.needed_number("high_freq_factor")
        if low >= high:
            raise rope.error(f"low_freq_factor is {low}; it must be below high_freq_factor, which is {high}")
        original = rope.size("original_max_position_embeddings")
        return scaling._replace(low_freq_factor=low, high_freq_factor=high, original_len=original)
    return scaling._replace(
        original_len=rope.size("original_max_position_embeddings", max_len),
        attention_factor=_yarn_attention(rope, scaling.factor),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )


def _yarn_attention(rope: Fields, factor: float) -> float:
    """Returns the number by which yarn multiplies cosines and sines."""
    if rope.get("attention_factor") is not None:
        return rope.needed_number("attention_factor")
    stretch = 0.1 * math.log(factor) if factor > 1 else 0.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return (stretch * rope.needed_number("mscale") + 1) / (stretch * rope.needed_number("mscale_all_dim") + 1)
    return stretch + 1


def add_rope(config: dict[str, Any], arch: Architecture) -> None:
    """Adds rotary positions to a config, under the names of the transformers version (4 or 5) it is from."""
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and "rope_theta" in nested:
        config["rope_parameters"] = {**nested, "rope_theta": arch.rope_theta}
    else:
        nested = {}
        config["rope_theta"] = arch.rope_theta
    scaling = arch.rope_scaling
    if scaling is None or config.get("rope_scaling") or "factor" in nested:
        return
    config["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        config["rope_scaling"]["original_max_position_embeddings"] = scaling.original_len
    names = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate"),
    }
    config["rope_scaling"] |= {name: getattr(scaling, name) for name in names.get(scaling.kind, ())}

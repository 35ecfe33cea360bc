"""Reads a task's ``generation_kwargs``: which sampling, how many tokens at most, and the texts that end an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.rules import RULES
from jaxblock.errors import UserError, shown
from jaxblock.model import Model

MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names under which tasks say how many tokens an answer has at most, the one that counts first."""
SAMPLING = ("do_sample", "temperature", "top_p", "top_k")
WITHOUT_EFFECT = {
    "num_beams": 1,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
"""Arguments that ask for nothing when they have this value; any other value is refused."""


class Generation(NamedTuple):
    """Says how an answer is generated.

    Attributes:
        until: texts that end an answer; they and what follows are cut off.
        most: the most tokens of an answer.
        options: the decoder's settings.
    """

    until: tuple[str, ...]
    most: int
    options: DecodeConfig


def read_gen_kwargs(kwargs: Mapping[str, Any], model: Model, where: str) -> Generation:
    """Converts a task's ``generation_kwargs`` into settings of the decoder.

    Where the task says nothing about sampling, the model's own settings are used. ``do_sample: false`` is temperature 0, and
    ``do_sample: true`` without a temperature is temperature 1.

    Args:
        kwargs: the task's arguments.
        model: the model, whose settings the task's replace.
        where: the task's name, for messages.

    Raises:
        UserError: an argument cannot be honoured, or has a value that it does not take.
    """
    left = dict(kwargs)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(text, str) and text for text in until):
        raise UserError(f"{where}: generation_kwargs: until must be texts, not {shown(until)}")
    most = [left.pop(name) for name in MOST_TOKENS if left.get(name) is not None]
    sampling = {name: left.pop(name) for name in SAMPLING if left.get(name) is not None}
    unknown = [name for name, value in left.items() if value is not None and WITHOUT_EFFECT.get(name) != value]
    if unknown:
        raise UserError(
            f"{where}: generation_kwargs: {unknown[0]} = {shown(left[unknown[0]])} cannot be honoured by a blockwise decoder; it "
            f"knows until, {', '.join((*SAMPLING, MOST_TOKENS[0]))}. Change the task's file, or give --gen_kwargs"
        )
    options = _sampling(sampling, model, where)
    response_len = model.layout(options).response_len
    return Generation(tuple(until), _most_tokens(most[0], response_len, where) if most else response_len, options)


def _most_tokens(value: Any, response_len: int, where: str) -> int:
    """Returns the most tokens of an answer; raises UserError where the canvas has no room for them."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: generation_kwargs: {MOST_TOKENS[0]} must be a number of tokens, not {shown(value)}")
    if value > response_len:
        raise UserError(
            f"{where} allows answers of {value} tokens ({MOST_TOKENS[0]}), and the canvas has {response_len} response positions. "
            f"Give --gen_kwargs {MOST_TOKENS[0]}={response_len} to score answers of at most so many, or --decode.response_len "
            "(a multiple of the block) if the network is to decode more than it was trained on"
        )
    return value


def _sampling(given: Mapping[str, Any], model: Model, where: str) -> DecodeConfig:
    """Returns the decoder's settings with the task's sampling."""
    sample, temperature = given.get("do_sample"), given.get("temperature")
    for name, value in given.items():
        kinds = bool if name == "do_sample" else int | float
        if not isinstance(value, kinds) or isinstance(value, bool) != (name == "do_sample"):
            raise UserError(f"{where}: generation_kwargs: {name} cannot be {shown(value)}")
    if sample is False or temperature == 0:
        _check_greedy(given, where)
        return greedy(model.options())
    fields: dict[str, Any] = {}
    if temperature is not None or sample:
        fields["temperature"] = 1.0 if temperature is None else float(temperature)
    if "top_p" in given:
        fields["top_p"] = None if given["top_p"] == 1 else float(given["top_p"])
    if "top_k" in given:
        fields["top_k"] = None if given["top_k"] == 0 else given["top_k"]
    try:
        return model.options(**fields)
    except UserError as error:
        raise UserError(f"{where}: generation_kwargs: {error}") from error


def _check_greedy(given: Mapping[str, Any], where: str) -> None:
    """Raises UserError where something asks for samples beside greedy decoding, as ``--gen_kwargs`` beside a task's own settings."""
    greedily = "do_sample: false" if given.get("do_sample") is False else "temperature 0"
    plain = {"temperature": (0, 1), "top_p": (1,), "top_k": (0,)}
    for name, without_effect in plain.items():
        if name in given and given[name] not in without_effect:
            raise UserError(
                f"{where}: generation_kwargs: {name} {shown(given[name])} has no effect beside {greedily}, which the task's file "
                f"may say: give do_sample=true and a temperature too, or leave {name} out"
            )


def greedy(options: DecodeConfig) -> DecodeConfig:
    """Returns the decoder's settings with the most probable token at every position, and none that only sampling uses."""
    if RULES[options.rule].measured_on == "candidates":  # there top_p and top_k also decide which positions come first
        return dataclasses.replace(options, temperature=0.0)
    return dataclasses.replace(options, temperature=0.0, top_p=None, top_k=None)

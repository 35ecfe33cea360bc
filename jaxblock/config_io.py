"""YAML <-> ``Config``, and the checks that span several fields.

A mistyped key is an error that names the nearest one; a value of the wrong type names the field. Precedence is
flag > YAML file > default.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from jaxblock import storage
from jaxblock.config import Config
from jaxblock.errors import UserError


def load(path: str | None) -> Config:
    """Reads a YAML file of sections; None gives the defaults.

    Raises:
        UserError: unreadable, not YAML, an unknown section or key, or a value of the wrong type.
    """
    if path is None:
        return Config()
    try:
        tree = yaml.safe_load(storage.read_bytes(path).decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    return from_tree(tree or {}, path)


def from_tree(tree: Any, where: str) -> Config:
    """Builds a ``Config`` from nested dicts, naming ``where`` in errors."""
    return _build(Config, tree, where, "")


def to_tree(config: Any) -> dict[str, Any]:
    """Nested plain values, ready for YAML or JSON."""
    return {
        key: list(value) if isinstance(value, tuple) else value if not isinstance(value, dict) else value
        for key, value in ((f.name, _plain(getattr(config, f.name))) for f in dataclasses.fields(config))
    }


def dump(config: Config) -> str:
    """The YAML text of a resolved config."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def _plain(value: Any) -> Any:
    return to_tree(value) if dataclasses.is_dataclass(value) else value


def _build(kind: Any, tree: Any, where: str, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys, not {tree!r}")
    hints = typing.get_type_hints(kind)
    known = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    values = {}
    for key, value in tree.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {prefix}{key}{_nearest(str(key), known)}")
        hint = known[key]
        if dataclasses.is_dataclass(hint):
            values[key] = _build(hint, value or {}, where, f"{prefix}{key}.")
        else:
            values[key] = _convert(hint, value, where, prefix + key)
    return kind(**values)


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        return _convert(next(a for a in get_args(hint) if a is not type(None)), value, where, name)
    if origin is Literal:
        if value in get_args(hint):
            return value
        choices = ", ".join(str(choice) for choice in get_args(hint))
        raise UserError(f"{where}: {name} is {value!r}{_nearest(str(value), dict.fromkeys(get_args(hint)))}; choose from {choices}")
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(get_args(hint)[0], item, where, name) for item in value)
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            pass
    elif isinstance(value, hint) and (hint is not int or not isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise UserError(f"{where}: {name} must be {wanted}, not {value!r}")


def validate(config: Config) -> Config:
    """Checks what spans several fields; returns the config.

    Raises:
        UserError: names the fields and what to set instead.
    """
    _check_canvas(config)
    _check_method(config)
    _check_model(config)
    _check_run(config)
    return config


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_canvas(config: Config) -> None:
    canvas = config.canvas
    for name in ("prompt_len", "response_len", "block"):
        _require(getattr(canvas, name) >= 1, f"canvas.{name} is {getattr(canvas, name)}: it must be at least 1")
    if canvas.context == "aligned":
        check_blocks(canvas.response_len, canvas.block, "canvas")


def check_blocks(response_len: int, block: int, section: str) -> None:
    """Raises UserError unless ``block`` divides ``response_len``; suggests the nearest sizes that do."""
    if response_len % block == 0:
        return
    divisors = [b for b in range(1, response_len + 1) if response_len % b == 0]
    near = min(divisors, key=lambda b: abs(b - block))
    up = -(-response_len // block) * block
    raise UserError(
        f"{section}.block {block} does not divide {section}.response_len {response_len}: "
        f"set block to {near} or response_len to {up}"
    )


def _check_method(config: Config) -> None:
    method, canvas = config.method, config.canvas
    _require(method.draws >= 1, f"method.draws is {method.draws}: it must be at least 1")
    if method.law == "antithetic":
        _require(method.draws % 2 == 0, f"method.law antithetic draws in pairs: set method.draws to {method.draws + 1}")
    for name in ("prefix_mask_rate", "suffix_mask_prob"):
        rate = getattr(method, name)
        _require(0 <= rate <= 1, f"method.{name} is {rate}: it is a probability, from 0 to 1")
    if method.suffix_window is not None:
        _require(method.suffix_window >= 0, f"method.suffix_window is {method.suffix_window}: it must be 0 or more")
        _require(
            canvas.context == "aligned",
            "method.suffix_window hides what the paper context shows after the response: "
            "set canvas.context to aligned, or suffix_window to null",
        )


def _check_model(config: Config) -> None:
    model = config.model
    if model.init_from is not None:
        return
    _require(
        model.d_model % model.n_heads == 0 and (model.d_model // model.n_heads) % 2 == 0,
        f"model.d_model {model.d_model} must split into model.n_heads {model.n_heads} heads of an even size",
    )
    kv_heads = model.n_kv_heads or model.n_heads
    _require(
        model.n_heads % kv_heads == 0, f"model.n_heads {model.n_heads} must be a multiple of model.n_kv_heads {kv_heads}"
    )
    width = config.canvas.prompt_len + config.canvas.response_len
    _require(
        width <= model.max_len,
        f"canvas.prompt_len + canvas.response_len = {width} is longer than model.max_len {model.max_len}",
    )


def _check_run(config: Config) -> None:
    train, optimizer, decode = config.train, config.optimizer, config.decode
    for name in ("steps", "batch_size", "log_every", "save_every", "keep"):
        _require(getattr(train, name) >= 1, f"train.{name} is {getattr(train, name)}: it must be at least 1")
    for name in ("seed", "eval_every", "eval_problems", "eval_nelbo_rows", "loader_workers"):
        _require(getattr(train, name) >= 0, f"train.{name} is {getattr(train, name)}: it must be 0 or more")
    _require(optimizer.lr > 0, f"optimizer.lr is {optimizer.lr}: it must be above 0")
    _require(
        optimizer.warmup_steps <= train.steps,
        f"optimizer.warmup_steps {optimizer.warmup_steps} is more than train.steps {train.steps}",
    )
    _require(decode.temperature >= 0, f"decode.temperature is {decode.temperature}: it must be 0 or more")
    _require(0 < decode.threshold <= 1, f"decode.threshold is {decode.threshold}: it must be above 0 and at most 1")
    _require(decode.factor > 0, f"decode.factor is {decode.factor}: it must be above 0")
    _require(decode.batch_size >= 1, f"decode.batch_size is {decode.batch_size}: it must be at least 1")

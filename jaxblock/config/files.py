"""YAML <-> ``Config``, and the checks that span several fields.

A mistyped key is an error that names the nearest one; a value of the wrong type names the field. Precedence is
flag > YAML file > default.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from jaxblock.config.config import Config
from jaxblock.diffusion.config import check_blocks
from jaxblock.diffusion.decoding.config import DREAM_MEASURES, RANKED_BY_QUOTA, TAKE_A_QUOTA, DecodeConfig
from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes


class _OnceOnly(yaml.SafeLoader):
    """A key given twice is an error: YAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is there twice", key_node.start_mark
                )
            if isinstance(key_node.value, str):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def load(path: str | None) -> Config:
    """Reads a YAML file of sections; None gives the defaults.

    Raises:
        UserError: unreadable, not YAML, an unknown section or key, or a value of the wrong type.
    """
    if path is None:
        return Config()
    try:
        tree = yaml.load(read_bytes(path).decode(), _OnceOnly)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    return from_tree({} if tree is None else tree, path)


def from_tree(tree: Any, where: str) -> Config:
    """Builds a ``Config`` from nested dicts, naming ``where`` in errors."""
    return _build(Config, tree, where, "")


def with_fields(section: Any, fields: Mapping[str, Any], where: str) -> Any:
    """A section with some of its fields replaced, checked as those of a file are.

    Args:
        section: a section of ``Config``.
        fields: values by name.
        where: what to name in errors.

    Raises:
        UserError: a field that the section does not have, or a value of the wrong type.
    """
    return _build(type(section), {**to_tree(section), **fields}, where, "")


def to_tree(config: Any) -> dict[str, Any]:
    """Nested plain values, ready for YAML or JSON."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def dump(config: Config) -> str:
    """The YAML text of a resolved config."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_tree(value)
    return list(value) if isinstance(value, tuple) else value


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
            # A section's name with nothing under it is an empty section.
            values[key] = _build(hint, {} if value is None else value, where, f"{prefix}{key}.")
        else:
            values[key] = _convert(hint, value, where, prefix + key)
    return kind(**values)


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        # YAML's null and, as on the command line, None.
        if value in (None, "None") and type(None) in get_args(hint):
            return None
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        if int in kinds and isinstance(value, int):  # a word or a number
            return _convert(int, value, where, name)
        return _convert(kinds[0], value, where, name)
    if origin is Literal:
        if value in get_args(hint):
            return value
        choices = ", ".join(str(choice) for choice in get_args(hint))
        raise UserError(
            f"{where}: {name} is {value!r}{_nearest(str(value), dict.fromkeys(get_args(hint)))}; choose from {choices}"
        )
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(get_args(hint)[0], item, where, name) for item in value)
    elif hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    elif hint is float and isinstance(value, numbers.Real | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            pass
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    wanted = f"a list of {get_args(hint)[0].__name__}" if origin is tuple else getattr(hint, "__name__", str(hint))
    raise UserError(f"{where}: {name} must be {wanted}, not {value!r}")


def validate(config: Config, sections: Collection[str] | None = None) -> Config:
    """Checks values, and what spans several fields; returns the config.

    Args:
        config: what to check.
        sections: those that a verb uses; None for all. What is not used is not checked.

    Raises:
        UserError: names the fields and what to set instead.
    """
    used = {f.name for f in dataclasses.fields(config)} if sections is None else set(sections)
    checks: dict[tuple[str, ...], Callable[[Config], None]] = {
        ("data",): _check_data,
        ("canvas",): _check_canvas,
        ("method", "canvas"): _check_method,
        ("model", "canvas"): _check_model,
        ("lora", "model"): _check_lora,
        ("train",): _check_train,
        ("optimizer", "train"): _check_optimizer,
        ("decode",): lambda config: check_decode(config.decode),
        ("evaluate",): _check_evaluate,
    }
    for needed, check in checks.items():
        if used.issuperset(needed):
            check(config)
    return config


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _at_least(section: Any, name: str, least: int, *fields: str) -> None:
    """Raises UserError unless the fields are None or at least so much."""
    for field in fields:
        value = getattr(section, field)
        _require(
            value is None or value >= least,
            f"{name}.{field} is {value}: it must be {'0 or more' if least == 0 else f'at least {least}'}",
        )


def _check_data(config: Config) -> None:
    data = config.data
    _at_least(data, "data", 0, "validation_records", "builtin_train", "builtin_test", "max_total_len", "max_records")
    _require(
        data.prompt_template is None or "{prompt}" in data.prompt_template,
        f"data.prompt_template {data.prompt_template!r} has no {{prompt}}: every record would ask the same",
    )
    _require(
        "" not in (data.exclude_types or ()),
        "data.exclude_types holds an empty text, which every type contains: take it out",
    )
    _require(
        not data.add_mask_token or data.tokenizer != "train",
        "data.add_mask_token is for a given tokenizer; one that is trained here has the mask token: leave it false",
    )


def _check_canvas(config: Config) -> None:
    canvas = config.canvas
    _at_least(canvas, "canvas", 1, "prompt_len", "response_len", "block")
    _require(
        canvas.block <= canvas.response_len,
        f"canvas.block {canvas.block} is longer than canvas.response_len {canvas.response_len}",
    )
    check_blocks(canvas.response_len, canvas.block, "canvas")
    if canvas.total_len is not None:
        _at_least(canvas, "canvas", 2, "total_len")
        _require(
            canvas.context == "paper",
            "canvas.total_len is for the paper context: under aligned all R positions follow the prompt, whatever its "
            "length; leave it out",
        )
    if canvas.suffix_window is not None:
        _at_least(canvas, "canvas", 0, "suffix_window")
        _require(
            canvas.context == "aligned",
            "canvas.suffix_window hides what the paper context shows after the response: "
            "set canvas.context to aligned, or suffix_window to null",
        )


def _check_method(config: Config) -> None:
    method = config.method
    _at_least(method, "method", 1, "draws")
    if method.law == "antithetic":
        _require(method.draws % 2 == 0, f"method.law antithetic draws in pairs: set method.draws to {method.draws + 1}")
    for name in ("prefix_mask_rate", "suffix_mask_prob"):
        rate = getattr(method, name)
        _require(0 <= rate <= 1, f"method.{name} is {rate}: it is a probability, from 0 to 1")


def _check_model(config: Config) -> None:
    model = config.model
    _at_least(model, "model", 1, "loss_chunk")
    if model.init_from is not None:
        return
    _require(
        model.init_step == "latest",
        f"model.init_step is {model.init_step}, but model.init_from, the run whose checkpoint it is, is not set",
    )
    _at_least(model, "model", 1, "d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_dim", "max_len")
    _require(
        model.d_model % model.n_heads == 0 and (model.d_model // model.n_heads) % 2 == 0,
        f"model.d_model {model.d_model} must split into model.n_heads {model.n_heads} heads of an even size",
    )
    kv_heads = model.n_kv_heads or model.n_heads
    _require(
        model.n_heads % kv_heads == 0,
        f"model.n_heads {model.n_heads} must be a multiple of model.n_kv_heads {kv_heads}",
    )
    width = config.canvas.prompt_len + config.canvas.response_len
    _require(
        width <= model.max_len,
        f"canvas.prompt_len + canvas.response_len = {width} is longer than model.max_len {model.max_len}",
    )


def _check_lora(config: Config) -> None:
    lora, model = config.lora, config.model
    _at_least(lora, "lora", 0, "rank")
    _require(0 <= lora.dropout < 1, f"lora.dropout is {lora.dropout}: it must be at least 0 and below 1")
    if lora.rank:
        _require(lora.alpha > 0, f"lora.alpha is {lora.alpha}: it must be above 0")
        _require(bool(lora.targets), "lora.targets is empty: name at least one matrix, or set lora.rank to 0")
        _require(
            model.init_from is not None,
            "lora.rank is above 0 but model.init_from is not set: adapters need trained weights beneath them",
        )
    else:
        _require(
            model.quantize == "none",
            f"model.quantize is {model.quantize}, but lora.rank is 0: int8 weights cannot be trained; set lora.rank, or "
            "model.quantize to none",
        )


def _check_train(config: Config) -> None:
    train = config.train
    _at_least(
        train,
        "train",
        1,
        "steps",
        "batch_size",
        "log_every",
        "save_every",
        "keep",
        "fsdp",
        "tensor",
        "slices",
        "accumulate",
    )
    _at_least(train, "train", 0, "seed", "eval_every", "eval_problems", "eval_nelbo_rows", "loader_workers")
    _at_least(train, "train", 0, "keep_every", "max_skipped", "watchdog_seconds")
    _require(
        train.keep_every % train.save_every == 0,
        f"train.keep_every {train.keep_every} is no multiple of train.save_every {train.save_every}: nothing is saved there",
    )
    _require(
        train.keep_best != "nelbo" or train.eval_nelbo_rows > 0,
        "train.keep_best is nelbo, but train.eval_nelbo_rows is 0: set it above 0",
    )
    _require(
        train.keep_best != "pass_at_1" or train.eval_problems > 0,
        "train.keep_best is pass_at_1, but train.eval_problems is 0: set it above 0",
    )
    _require(
        train.batch_size % train.accumulate == 0,
        f"train.batch_size {train.batch_size} does not split into train.accumulate {train.accumulate} parts: use a multiple",
    )
    _require(
        train.data_parallel == -1 or train.data_parallel >= 1,
        f"train.data_parallel is {train.data_parallel}: it must be at least 1, or -1 for all devices that remain",
    )
    if train.profile is not None:
        _require(
            len(train.profile) == 2 and 1 <= train.profile[0] <= train.profile[1] <= train.steps,
            f"train.profile is {' '.join(map(str, train.profile))}: give the first and the last step of the trace, between 1 and "
            f"train.steps ({train.steps}); step 1 also compiles",
        )


def _check_optimizer(config: Config) -> None:
    optimizer, train = config.optimizer, config.train
    _require(optimizer.lr > 0, f"optimizer.lr is {optimizer.lr}: it must be above 0")
    _require(0 <= optimizer.ema < 1, f"optimizer.ema is {optimizer.ema}: it must be at least 0 and below 1")
    _require(optimizer.eps > 0, f"optimizer.eps is {optimizer.eps}: it must be above 0")
    _at_least(optimizer, "optimizer", 0, "warmup_steps", "weight_decay", "clip_norm", "final_ratio", "warmup_floor")
    if optimizer.schedule != "deepspeed_cosine":
        for name, only in (("warmup", "linear"), ("warmup_floor", 0.0), ("scheduler_steps", "before_update")):
            value = getattr(optimizer, name)
            _require(
                value == only,
                f"optimizer.{name} is {value}, which only the schedule deepspeed_cosine knows: set it to {only}, or "
                f"optimizer.schedule ({optimizer.schedule} now) to deepspeed_cosine",
            )
    _require(
        optimizer.name == "adamw" or optimizer.b1 > 0 or optimizer.moments == "float32",
        f"optimizer.moments is {optimizer.moments}, but adafactor with b1 0 keeps no moments that it could apply to: "
        "set it to float32, or optimizer.b1 above 0",
    )
    for name in ("b1", "b2"):
        value = getattr(optimizer, name)
        _require(0 <= value < 1, f"optimizer.{name} is {value}: it must be at least 0 and below 1")
    _require(
        optimizer.warmup_steps <= train.steps,
        f"optimizer.warmup_steps {optimizer.warmup_steps} is more than train.steps {train.steps}: set it lower",
    )


def check_decode(decode: DecodeConfig) -> None:
    """Raises UserError where a field of the ``decode`` section has a value it cannot take, or one without effect."""
    _at_least(decode, "decode", 1, "response_len", "block", "steps_per_block", "batch_size", "top_k")
    _at_least(decode, "decode", 0, "temperature", "alg_temp", "cfg_scale", "seed", "fill_id")
    _require(0 < decode.threshold <= 1, f"decode.threshold is {decode.threshold}: it must be above 0 and at most 1")
    _require(decode.factor > 0, f"decode.factor is {decode.factor}: it must be above 0")
    _require(
        decode.top_p is None or 0 < decode.top_p <= 1, f"decode.top_p is {decode.top_p}: it must be above 0, at most 1"
    )
    _require(0 < decode.eps < 1, f"decode.eps is {decode.eps}: it must be above 0 and below 1")
    _check_rule(decode)


_KEEPS_ALL = (("top_p", None), ("top_p", 1), ("top_k", None))
"""Filters that are off."""


def _check_rule(decode: DecodeConfig) -> None:
    """Raises UserError where a field is set that the rule does not look at: nothing is ignored silently."""
    used_by: dict[str, Collection[str]] = {
        "quota": TAKE_A_QUOTA,
        "alg_temp": RANKED_BY_QUOTA,
        "threshold": ("confidence_threshold",),
        "factor": ("factor",),
        "factor_rule": ("factor",),
    }
    plain = DecodeConfig()
    for name, rules in used_by.items():
        value, default = getattr(decode, name), getattr(plain, name)
        _require(
            decode.rule in rules or value == default,
            f"decode.{name} {value} has no effect under decode.rule {decode.rule}: set {name} to {default}, "
            f"or rule to {' or '.join(rules)}",
        )
    on_the_grid = decode.rule == "origin" or (decode.quota == "dream" and decode.rule in TAKE_A_QUOTA)
    _require(
        on_the_grid or decode.eps == plain.eps,
        f"decode.eps {decode.eps} has no effect without Dream's time grid: set eps to {plain.eps}, quota to dream "
        "(and a rule that takes a quota), or rule to origin",
    )
    filtered = [name for name in ("top_p", "top_k") if (name, getattr(decode, name)) not in _KEEPS_ALL]
    _require(
        not filtered or decode.temperature > 0 or decode.rule in DREAM_MEASURES,
        f"decode.{' and decode.'.join(filtered)} cannot change the best token, and decode.rule {decode.rule} does not "
        f"measure confidence on what is left: set decode.temperature above 0, {' and '.join(filtered)} to null, or "
        f"rule to {' or '.join(DREAM_MEASURES)}",
    )
    _require(
        decode.eos_suppression != "confidence" or decode.rule not in ("random", "origin"),
        f"decode.eos_suppression confidence has no effect under decode.rule {decode.rule}, which looks at no "
        "confidence: set eos_suppression to none or logits",
    )


def _check_evaluate(config: Config) -> None:
    _at_least(config.evaluate, "evaluate", 1, "problems", "nelbo_samples", "nelbo_rows")

"""Reads and writes a ``Config`` as YAML.

A mistyped key is an error that names the nearest known key; a value of the wrong type is an error that names the field.

We check types ourselves: pydantic, tried on these classes, accepts a mistyped key of a plain dataclass, reads ``true`` as 1,
and adds 0.7 s to every start.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from jaxblock.config.config import Config
from jaxblock.config.not_offered import why_not_offered
from jaxblock.config.presets import find_settings
from jaxblock.errors import UserError, shown
from jaxblock.io.files import read_bytes
from jaxblock.io.paths import PathLike
from jaxblock.settings import Section

S = TypeVar("S", bound=Section)


_MOST_BYTES = 1 << 18  # PyYAML reads about 0.1 MB a second
_MOST_KEYS = 1000  # of one mapping: `<<` can otherwise repeat a mapping without end


class _UniqueKeys(yaml.SafeLoader):
    """Loads YAML, but refuses a key that is given twice, where PyYAML would silently use the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Returns the mapping that a YAML node describes; raises ConstructorError where a key is repeated or no text."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node.value, str):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key_node.value)} is there twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        """Returns a scalar's text; raises ConstructorError for 010 and 1:30, which YAML 1.1 reads as 8 and 90."""
        text = str(super().construct_scalar(node))
        if node.tag.endswith((":int", ":float")) and (":" in text or re.fullmatch(r"[-+]?0[0-9_]+", text)):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"YAML reads {text} as another number: write it without colons and leading zeros",
                node.start_mark,
            )
        return text

    def flatten_mapping(self, node: Any) -> None:
        """Puts the mappings that `<<` names into a mapping; raises ConstructorError where they have too many keys."""
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:
            raise yaml.constructor.ConstructorError(None, None, f"more than {_MOST_KEYS} keys", node.start_mark)


def load_config(path: str | None) -> Config:
    """Reads a YAML file of sections.

    Args:
        path: the file, or the name of a preset; None gives the defaults.

    Raises:
        UserError: the file cannot be read or is not YAML, a section or key is unknown, or a value has the wrong type.
    """
    if path is None:
        return Config()
    path = find_settings(path)
    return config_from_tree(read_tree(path), path)


def read_tree(path: PathLike) -> Any:
    """Reads a YAML file as nested plain values; an empty file gives {}.

    Raises:
        UserError: the file cannot be read, is too large to be a file of settings, or is not YAML.
    """
    content = read_bytes(path)
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path}: {len(content):,} bytes are too many for a file of settings: is it another file?")
    try:
        tree = yaml.load(content.decode(), _UniqueKeys)  # noqa: S506 (a SafeLoader)
    except RecursionError as error:
        raise UserError(f"{path}: not valid YAML: lists or mappings are nested too deeply") from error
    except (yaml.YAMLError, ValueError, AttributeError) as error:  # the last two: from values such as `!!int x`
        raise UserError(f"{path}: not valid YAML: {error}") from error
    return {} if tree is None else tree


def config_from_tree(tree: Any, where: str) -> Config:
    """Builds a ``Config`` from nested dicts.

    Args:
        tree: the sections by name, each a dict of values by field; a missing section or field has its default.
        where: the name of the file or call, for error messages.

    Raises:
        UserError: a section or key is unknown, or a value has the wrong type.
    """
    config: Config = build_from_tree(Config, tree, where, "")
    return config


def value_of(text: str) -> Any:
    """Returns the value that a text would have in a YAML file; a text that is not YAML stands for itself."""
    try:
        return yaml.load(text, _UniqueKeys)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError):
        return text


def with_fields(section: S, fields: Mapping[str, Any], where: str) -> S:
    """Returns a section with some of its fields replaced; the new values are type-checked as those of a file are.

    Args:
        section: the section whose fields are replaced.
        fields: the new values by field.
        where: the name of the call, for error messages.

    Raises:
        UserError: the section does not have a field, or a value has the wrong type.
    """
    changed: S = build_from_tree(type(section), {**to_tree(section), **fields}, where, "")
    return changed


def to_tree(config: Config | Section) -> dict[str, Any]:
    """Returns a config or section as nested plain values, ready for YAML or JSON."""
    return {entry.name: _plain(getattr(config, entry.name)) for entry in dataclasses.fields(config)}


def to_yaml(config: Config) -> str:
    """Returns the YAML text of a config, every default included."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return to_tree(value)
    return list(value) if isinstance(value, tuple) else value


def build_from_tree(kind: Any, tree: Any, where: str, prefix: str) -> Any:
    """Builds a dataclass, such as ``Config`` or a section of it, from nested plain values.

    Args:
        kind: the dataclass; fields that are dataclasses are built from the mappings under their names.
        tree: the values by field.
        where: the name of the file or call, for error messages.
        prefix: the place of the tree in the file, for error messages: "" or a name with a dot at its end.

    Raises:
        UserError: a key is unknown, or a value has the wrong type.
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys, not {shown(tree)}")
    hints = typing.get_type_hints(kind)
    known = {entry.name: hints[entry.name] for entry in dataclasses.fields(kind)}
    values = {}
    for key, value in tree.items():
        if key not in known:
            name = key[:80] if isinstance(key, str) else shown(key)
            if (why := why_not_offered(name)) is not None:
                raise UserError(f"{where}: {prefix}{name}: {why}")
            elsewhere = [f"{room}.{name}" for room, section in _sections() if prefix and name in section]
            hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else _nearest(name, known)
            raise UserError(f"{where}: unknown key {prefix}{name}{hint}")
        hint = known[key]
        if dataclasses.is_dataclass(hint):
            # A section's name with nothing under it is an empty section.
            values[key] = build_from_tree(hint, {} if value is None else value, where, f"{prefix}{key}.")
        else:
            values[key] = _convert(hint, value, where, prefix + key)
    return kind(**values)


def _sections() -> list[tuple[str, set[str]]]:
    """Lists the sections of a config with the names of their fields."""
    hints = typing.get_type_hints(Config)
    return [(name, {entry.name for entry in dataclasses.fields(hint)}) for name, hint in hints.items()]


def _nearest(key: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    """Converts a value to the type that its field is annotated with; raises UserError where it does not have that type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        # YAML writes null, the command line writes None.
        if value in (None, "None") and type(None) in get_args(hint):
            return None
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        if int in kinds and isinstance(value, int):  # a field that accepts a word or a number
            return _convert(int, value, where, name)
        if isinstance(value, list | tuple):  # a field that accepts a word or a list of words
            kinds = [kind for kind in kinds if getattr(kind, "__origin__", None) is tuple] or kinds
        return _convert(kinds[0], value, where, name)
    if origin is Literal:
        if any(value == one and type(value) is type(one) for one in get_args(hint)):  # 1 is not true
            return value
        choices = [str(one).lower() if isinstance(one, bool) else one for one in get_args(hint)]
        if isinstance(value, bool) and not any(isinstance(one, bool) for one in get_args(hint)):
            words = "yes, on and true as true" if value else "no, off and false as false"
            raise UserError(f"{where}: {name}: YAML reads {words}; write it in quotes, as one of {', '.join(choices)}")
        raise UserError(
            f"{where}: {name} is {shown(value)}{_nearest(shown(value), choices)}; choose from {', '.join(choices)}"
        )
    if origin is tuple:
        if isinstance(value, list | tuple) and (Ellipsis in get_args(hint) or len(value) == len(get_args(hint))):
            return tuple(_convert(get_args(hint)[0], item, where, name) for item in value)
    elif hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    elif hint is float and isinstance(value, numbers.Real | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except (ValueError, OverflowError):
            pass
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    if hint is str and isinstance(value, bool):
        raise UserError(
            f"{where}: {name} must be a text, and YAML reads yes, no, on and off as true and false: write it in quotes"
        )
    wanted = getattr(hint, "__name__", str(hint))
    if origin is tuple:
        count = "" if Ellipsis in get_args(hint) else f"{len(get_args(hint))} "
        wanted = f"a list of {count}{get_args(hint)[0].__name__}"
    raise UserError(f"{where}: {name} must be {wanted}, not {shown(value)}")

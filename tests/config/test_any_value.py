"""Property: whatever values a config has, it is accepted and survives being written, or is refused by one clear message."""

import dataclasses
import datetime
import tempfile
import typing
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings

from jaxblock.config.checks import check_config
from jaxblock.config.config import Config
from jaxblock.config.yaml import config_from_tree, load_config, to_yaml
from jaxblock.errors import UserError

FIELDS = [(section, field.name) for section in Config().sections() for field in dataclasses.fields(section)]
ODD_JSON = st.sampled_from([
    None, True, False, 0, 1, -1, 2**31, 10**12, 10**400, 0.5, 1e-300, 1e39, float("nan"), float("inf"), "", "None", "\ud800",
    "a\0b", "\x1b[31m", "x" * 5000, [], {}, [[]], [0], [-1, "q"], [None], {"a": 1}, {"": []}, "llama", "float32", 2 * 10**9,
])  # fmt: skip
ODD = ODD_JSON | st.sampled_from([
    2, 7, -(2**31), 2**40, 0.0, -0.0, 1.0, float("-inf"), " ", "nan", "1e5", "1e999", "\u202e", [-1], [1, 1], [1, 10**12], ["q"],
    ["\ud800"], datetime.date(2001, 1, 1), b"x",
])  # fmt: skip
TEXTS = st.text(max_size=8) | st.from_regex(r"[\[\]{}&*!|>?:,'\"\-<~ \n0-9a-e]{0,40}", fullmatch=True)


def values_of(section: Any, name: str) -> st.SearchStrategy[Any]:
    """Returns odd values, and values of the field's own type."""
    hint = typing.get_type_hints(type(section))[name]
    return ODD | st.from_type(hint) | st.integers(-3, 70)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for section, name in draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=4, unique_by=str)):
        tree.setdefault(section.section_name, {})[name] = draw(values_of(section, name))
    return tree


def is_refused_clearly(error: UserError) -> bool:
    text = str(error)
    return all(line.isprintable() for line in text.splitlines()) and len(text) < 8000 and bool(text)


def check_any_tree(tree: dict[str, Any]) -> None:
    try:
        config = check_config(config_from_tree(tree, "here"))
    except UserError as error:
        assert is_refused_clearly(error), str(error)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(str(path)) == config


QUICK = settings(max_examples=60, deadline=10_000, suppress_health_check=[HealthCheck.too_slow])
LONG = settings(QUICK, max_examples=2000)


@QUICK
@given(trees())
@example({"decode": {"stop_ids": [10**400]}})
def test_any_values(tree):
    check_any_tree(tree)


@QUICK
@given(TEXTS)
def test_any_file(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        try:
            check_config(load_config(str(path)))
        except UserError as error:
            assert is_refused_clearly(error), str(error)


@pytest.mark.slow
@LONG
@given(trees())
def test_any_values_at_length(tree):
    check_any_tree(tree)

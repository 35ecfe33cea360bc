"""Data flows one way: text, tokens, store, loader. A folder of the data room imports only those before it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import jaxblock.data

ROOM = Path(jaxblock.data.__path__[0])
ORDER = ("text", "tokens", "store", "loader")


@pytest.mark.parametrize("place", ORDER)
def test_a_folder_imports_only_those_before_it(place: str) -> None:
    allowed = {*ORDER[: ORDER.index(place) + 1], "config"}
    files = [ROOM / "loader.py"] if place == "loader" else list((ROOM / place).glob("*.py"))
    assert files
    for file in files:
        imported = set(re.findall(r"jaxblock\.data\.(\w+)", file.read_text()))
        assert imported <= allowed, f"{file.name} imports {sorted(imported - allowed)}"

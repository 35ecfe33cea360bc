"""Data flows one way: text, tokens, store, loader. A folder of the data room imports only those before it."""

from __future__ import annotations

import re
from pathlib import Path

import jaxblock.data

ROOM = Path(jaxblock.data.__path__[0])
ORDER = ("text", "tokens", "store", "loader")


def test_a_folder_imports_only_those_before_it() -> None:
    for at, place in enumerate(ORDER):
        files = [ROOM / "loader.py"] if place == "loader" else list((ROOM / place).glob("*.py"))
        imported = {
            (name, file.name) for file in files for name in re.findall(r"jaxblock\.data\.(\w+)", file.read_text())
        }
        assert files and [one for one in imported if one[0] not in {*ORDER[: at + 1], "config"}] == []

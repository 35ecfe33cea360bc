"""What the kit writes: ``results.json`` for programs and ``results.md`` for people, both whole after every item."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""What became of one item: status, reason, seconds, date, commit, environment, limit, rows."""

TO_REPEAT = ("no time left", "time limit", "interrupted")
"""How an item ended that the next call takes up again; any other ending is a result."""


def read(path: Path) -> dict[str, Any]:
    """Reads results.json; returns an empty record where there is none yet."""
    if not path.exists():
        return {"items": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(folder: Path, record: Mapping[str, Any], order: Iterable[tuple[str, str]]) -> None:
    """Writes both files, each in one move, so that a reader never sees half of one.

    Args:
        folder: where they go.
        record: the whole record; its ``items`` are the results by name.
        order: name and description of every item, in the order of the table.
    """
    texts = {"results.json": json.dumps(record, indent=1) + "\n", "results.md": markdown(record, order)}
    for name, text in texts.items():
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)


def markdown(record: Mapping[str, Any], order: Iterable[tuple[str, str]]) -> str:
    """Lays the record out: where it was measured, an overview of the items, and a table of each item's findings."""
    items: Mapping[str, Result] = record["items"]
    known = [(name, what) for name, what in order if name in items]
    lines = ["# jaxblock on an accelerator", ""]
    if record.get("tiny"):
        lines += ["**A rehearsal with tiny sizes: its numbers mean nothing.**", ""]
    lines += ["| measured on | date | commit | versions | items |", "|---|---|---|---|---|"]
    lines += [_cells(*row) for row in _places(items, known)]
    lines += ["", "| item | what became of it | time | of at most |", "|---|---|---|---|"]
    for name, _ in known:
        found = items[name]
        why = f": {found['reason']}" if found.get("reason") else ""
        lines.append(_cells(name, found["status"] + why, f"{found['seconds']:.0f} s", f"{found['limit']:.0f} s"))
    for name, what in known:
        if items[name]["rows"]:
            lines += ["", f"## {name}", "", what, "", "| case | quantity | value |", "|---|---|---|"]
            lines += _findings(items[name]["rows"])
    lines += ["", "Of repeated measurements: median (least to most, number of runs)."]
    return "\n".join(lines) + "\n"


def _places(items: Mapping[str, Result], known: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Lists the surroundings in which the items ran, with the items of each: a resumed record may have several."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, _ in known:
        found = items[name]
        where = found.get("environment") or {}
        device = (
            f"{where['devices']} x {where['device']} ({where['platform']})" if where else "not known: JAX did not start"
        )
        versions = ", ".join(f"{package} {version}" for package, version in where.get("versions", {}).items())
        versions += f"; {where['runtime']}" if where else ""
        groups.setdefault((device, found["date"][:10], found["commit"], versions), []).append(name)
    return [(*place, ", ".join(names)) for place, names in groups.items()]


def _findings(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        case = row["case"]
        for quantity, value in row.items():
            if quantity == "case":
                continue
            lines.append(_cells(case, quantity, shown(value)))
            case = ""
    return lines


def _cells(*texts: str) -> str:
    return "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) + " |"


def shown(value: Any) -> str:
    """Formats a value for people: four significant digits, and repeated measurements with their range."""
    if isinstance(value, Mapping):
        low, high = shown(value["least"]), shown(value["most"])
        return f"{shown(value['median'])} ({low} to {high}, {value['runs']})"
    if value is None:
        return "not known on this device"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)

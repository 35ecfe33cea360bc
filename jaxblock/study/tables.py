"""Writes tables as Markdown, plain text and HTML, and the frame of an HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence

Row = list[str]
Table = tuple[Row, list[Row]]
"""The header and the rows of a table."""


def markdown_table(table: Table) -> str:
    """Returns a table in Markdown."""
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text_table(table: Table) -> str:
    """Returns a table in columns of plain text."""
    header, rows = table
    widths = [max(len(row[at]) for row in [header, *rows]) for at in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )


_CSS = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #8884; white-space: nowrap; }
figure { margin: 1rem 0; background: #fff; border-radius: 4px; padding: .5rem; overflow-x: auto; }
pre { overflow-x: auto; font-size: 13px; }
"""


def html_page(title: str, body: Sequence[str]) -> str:
    """Returns an HTML page that needs no other file.

    Args:
        title: the page's title, not escaped.
        body: the elements of the page, one after the other.
    """
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}<style>{_CSS}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def html_table(table: Table) -> str:
    """Returns a table in HTML."""
    header, rows = table
    lines = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    names = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{''.join(lines)}</tbody></table>"

"""Assembles HTML pages that need nothing but themselves: no network, no fonts, no pictures.

A page's policy (Content-Security-Policy) allows the styles and scripts that it was written with, by their hashes, and nothing
else: a text that escaped its place would not run.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any


@functools.cache
def asset(name: str) -> str:
    """Returns the text of a style sheet or script in the folder ``assets`` beside this file."""
    return resources.files("jaxblock.reporting").joinpath("assets", name).read_text(encoding="utf-8")


def html_document(
    title: str, body: str, *, styles: Sequence[str], scripts: Sequence[str] = (), data: dict[str, Any] | None = None
) -> str:
    """Returns a whole HTML document.

    Args:
        title: the title, as plain text.
        body: the content of the body, as HTML.
        styles: the names of style sheets in ``assets``; ``page.css`` comes before them.
        scripts: the names of scripts in ``assets``, which run in this order when the body is there.
        data: what the scripts read, as JSON, from the element with the id ``data``; any text in it is safe.
    """
    style = "\n".join(map(asset, ("page.css", *styles)))
    codes = [f"\n{asset(name)}" for name in scripts]
    allowed = " ".join(map(_hash, codes)) or "'none'"
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {allowed}; base-uri 'none'; form-action 'none'"
    stored = "" if data is None else f'<script type="application/json" id="data">{json_for_html(data)}</script>\n'
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>\n'
        f"<body>{body}\n{stored}{''.join(f'<script>{code}</script>{chr(10)}' for code in codes)}</body></html>\n"
    )
    return page.encode("utf-8", "replace").decode()  # half a surrogate pair, which JSON can hold, is no text


def json_for_html(value: Any) -> str:
    """Returns JSON that may stand inside a script element: no text in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    """Returns how a page's policy names an inline style sheet or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

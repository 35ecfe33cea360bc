"""Token texts as they are shown: white space made visible, control characters disarmed."""

from __future__ import annotations

_SHOWN = {"\n": "⏎", "\t": "⇥", "\r": "␍", "▁": " ", "Ġ": " ", "Ċ": "⏎", "ĉ": "⇥"}
MASK_GLYPH = "░░"
"""Stands for one mask token."""


def visible(piece: str) -> str:
    """Makes one token's text safe and legible in a line of text.

    Args:
        piece: a token as its vocabulary writes it; SentencePiece's ``▁`` and byte-level BPE's ``Ġ`` are spaces.

    Returns:
        The text with line breaks and tabs as glyphs and control characters (terminal escapes among them) as ``\\xNN``;
        ``∅`` for a token without text.
    """
    shown = "".join(_SHOWN.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in piece)
    return shown or "∅"

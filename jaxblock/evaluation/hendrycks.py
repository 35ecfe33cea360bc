r"""Normalises answers by the published string rule of the MATH data set (Hendrycks et al., 2021).

Two answers are the same when their normalised texts are equal. No algebra is done, so that ``x + 1`` and ``1 + x`` differ.
"""

from __future__ import annotations

import re

_ARGUMENT = re.compile(r"\\frac([^{])(\{[^{}]*\}|[^{])")
_RATIO = re.compile(r"(-?\d+)/(-?\d+)")

# Replacements before and after a leading "x =" is dropped, in the published order.
_BEFORE = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\n|\\!", ""),
        (r"\\\\", r"\\"),
        (r"\\[td]frac", r"\\frac"),
        (r"\\left|\\right", ""),
        (r"\^\{\\circ\}|\^\\circ|\\\$", ""),
        (r"\\text\{ .*", ""),  # a unit ends the answer
        (r"\\?%", ""),
        (r"(^|[ {])\.", r"\g<1>0."),
    )
]


def _with_braces(fraction: re.Match[str]) -> str:
    top, bottom = fraction.groups()
    return rf"\frac{{{top}}}" + (bottom if bottom.startswith("{") else f"{{{bottom}}}")


def normalise_hendrycks(text: str) -> str:
    r"""Returns an answer as the MATH data set's own comparison spells it.

    It drops line breaks, blanks, sizes of brackets, degree, per cent and escaped dollar signs, a unit (``\text{ cm}``) with
    everything behind it, and a left side of at most two characters (``x =``); it writes ``\frac``, ``\sqrt{3}``,
    ``\frac{1}{2}`` for ``\frac12``, ``1/2`` and ``0.5``.

    Args:
        text: an answer, as it is written in the box.
    """
    for pattern, replacement in _BEFORE:
        text = pattern.sub(replacement, text)
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = _ARGUMENT.sub(_with_braces, text)
    if text == "0.5":
        return r"\frac{1}{2}"
    return _RATIO.sub(r"\\frac{\1}{\2}", text) if _RATIO.fullmatch(text) else text

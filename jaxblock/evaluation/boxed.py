r"""Extracts the answers of competition mathematics from the last ``\boxed{}`` of a response, and normalises their text."""

from __future__ import annotations

import re

# Without braces a box holds one number or command, or what stands before a dollar sign: `put it in \boxed as asked` has no box.
_BOX = re.compile(r"\\f?box(?:ed)?\s*(?=\{)|\\boxed\s*(?P<bare>[-\d\\][^\s${}]*|(?<=\s)[^\s${}]+(?=\s*\$))")
_ANSWER_IS = re.compile(r"answer(?:\s+is(?![a-z])|\s*:)", re.IGNORECASE)
_FORMULA = r"(?:\$\$?(?:\\.|[^$\\])+\$\$?|\\\(.+?\\\)|\\\[.+?\\\])"
_FORMULAS = re.compile(rf"{_FORMULA}(?:(?:\s*,\s*|\s*,?\s*(?:and|or)\s+){_FORMULA})*")
_DELIMITER = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_SENTENCE_END = re.compile(r"[.!?](?=\s)")
_GROUPED = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"(-?\d+)\.(\d+)")
_ARGUMENT = r"(\{[^{}]*\}|[A-Za-z0-9])"


def _with_braces(fraction: re.Match[str]) -> str:
    return r"\frac" + "".join(part if part.startswith("{") else f"{{{part}}}" for part in fraction.groups())


# Replacements, applied in order: they unify spellings that LaTeX renders alike, and remove units.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\\[,!;: ]|~", " "),
        (r"\{,\}", ","),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", ""),
        (r"\\?[%$£€]", ""),
        (r"^(-?[\d.,]+)\s+(?!pi|sin|cos|tan|log|sqrt|exp)[A-Za-z]{3}[A-Za-z ]*$", r"\1"),  # a unit in plain text
        (r"(?<=\S)\s*\\(?:(?:text|mbox|textrm)\s*\{[^{}]*\}|mathrm\{[^{}]{2,}\})\s*$", ""),  # a unit after the value
        (r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1"),
        (r"(?<=\d)\s+(?=\d{3}(?!\d))", ""),  # thousands
        (r"(?<!\d)\s+|\s+(?!\d)", ""),  # `1 1/2` is not `11/2`
        (r"\\varnothing", r"\\emptyset"),
        (r"\\sqrt([A-Za-z0-9])", r"\\sqrt{\1}"),
        (rf"\\frac{_ARGUMENT}{_ARGUMENT}", _with_braces),
        (r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"(?<![\d.])\.(?=\d)", "0."),
    )
]


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last ``\boxed{...}`` or ``\fbox{...}``; None where there is none or it is cut short.

    An empty box counts only if all are empty: a response may speak of ``\boxed{}``.
    """
    content: str | None = None
    for box in reversed(list(_BOX.finditer(text))):
        found = box["bare"] if box["bare"] is not None else _in_braces(text, box.end())
        if found is None or found.strip():
            return found
        content = found
    return content


def _in_braces(text: str, start: int) -> str | None:
    """Returns what is between the brace at ``start`` and the one that closes it; None where none does."""
    depth = 0
    for at in range(start, len(text)):
        escaped = text[at - 1] == "\\"
        depth += (text[at] == "{" and not escaped) - (text[at] == "}" and not escaped)
        if not depth:
            return text[start + 1 : at]
    return None


def extract_answer(text: str) -> str | None:
    """Returns the content of a response's last box, else what its last "answer is" (or "answer:") says, else None.

    What it says are the formulas in dollar signs, ``\\(`` or ``\\[`` that the line begins with (``$3$ and $4$``); else the text
    up to the end of the sentence or line.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    for stated in reversed(list(_ANSWER_IS.finditer(text))):
        rest = text[stated.end() :].lstrip().removeprefix(":").lstrip(" \t\r\n*")
        if rest:
            line = rest.partition("\n")[0]
            formulas = _FORMULAS.match(line)
            if formulas:
                return _DELIMITER.sub("", formulas[0])
            return _SENTENCE_END.split(line, maxsplit=1)[0].strip().rstrip("*")
    return None


def normalise_latex(text: str) -> str:
    r"""Returns an answer in one fixed spelling, so that answers that are spelled differently but mean the same are equal.

    It drops blanks, sizes of brackets, ``\text{}`` around words, units after a value, degree, per cent and dollar signs,
    a final full stop, grouping commas of a number and zeros at a decimal's end; ``\dfrac``, ``\frac12`` and ``1/2`` become
    ``\frac{1}{2}``, and so does ``0.5``.

    Args:
        text: an answer, as it is written in the box.
    """
    text = text.strip().rstrip(".")
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    decimal = _DECIMAL.fullmatch(text)
    if decimal:
        fraction = decimal[2].rstrip("0")
        text = f"{decimal[1]}.{fraction}" if fraction else decimal[1]
    return r"\frac{1}{2}" if text == "0.5" else text

"""Defines graders, each of which extracts the answer from a response and compares it with the reference.

Scores of different graders cannot be compared (they differ by 2 to 6 points for one checkpoint), so every score is reported
with its grader's name. A grader is a pure function of two texts; the caller cuts the response at its first stop token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from jaxblock.errors import UserError
from jaxblock.evaluation.boxed import extract_answer, normalise_latex

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


class Graded(NamedTuple):
    """Holds the grade of one response.

    Attributes:
        correct: whether the extracted answer equals the expected one after normalisation.
        extracted: the answer as it is written in the response, before normalisation; None if there is none.
        expected: the reference's answer after normalisation.
    """

    correct: bool
    extracted: str | None
    expected: str


Grader = Callable[[str, str], Graded]


def normalise_gsm8k(text: str) -> str:
    """Normalises an answer as lm-eval's GSM8K tasks do before they compare it.

    It drops ``,`` and ``$``, everything up to the last ``#### ``, and a final dot, and makes letters lower case. Outer white
    space is dropped as well, since a reference that ends in a line break would otherwise equal no answer.

    Args:
        text: an extracted answer, or a whole reference (``worked answer #### 18``).
    """
    answer = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return answer.strip().removesuffix(".").lower()


def _graded(extracted: str | None, expected: str, normalise: Callable[[str], str]) -> Graded:
    """Compares an extracted answer, after normalisation, with the expected one, which is normalised already."""
    return Graded(extracted is not None and normalise(extracted) == expected, extracted, expected)


def gsm8k_strict(response: str, reference: str) -> Graded:
    """Grades the number after the first ``#### `` (lm-eval ``gsm8k``, filter ``strict-match``).

    Args:
        response: decoded text, cut at its first stop token.
        reference: the reference answer, with or without its ``#### ``.

    Returns:
        The grade; ``extracted`` is None when the response has no ``#### <number>``.
    """
    found = _STRICT.search(response)
    return _graded(found.group(1).strip() if found else None, normalise_gsm8k(reference), normalise_gsm8k)


def gsm8k_flexible(response: str, reference: str) -> Graded:
    """Grades the last text in the response that looks like a number (lm-eval ``gsm8k``, filter ``flexible-extract``).

    A single digit counts as a number, and so does any run of two or more of ``$0-9.,``, as in lm-eval (even ``...``).

    Args:
        response: decoded text, cut at its first stop token.
        reference: the reference answer, with or without its ``#### ``.

    Returns:
        The grade; ``extracted`` is None when nothing looks like a number.
    """
    found = _NUMBER.findall(response)
    return _graded(found[-1].strip() if found else None, normalise_gsm8k(reference), normalise_gsm8k)


def exact(response: str, reference: str) -> Graded:
    """Grades the whole response, which must equal the whole reference apart from outer white space.

    Args:
        response: decoded text, cut at its first stop token.
        reference: the text that is expected.

    Returns:
        The grade; ``extracted`` is the stripped response, None when that is empty.
    """
    given, expected = response.strip(), reference.strip()
    return Graded(given == expected, given or None, expected)


def math_boxed(response: str, reference: str) -> Graded:
    r"""Grades the content of the last ``\boxed{}``, else the text after the last "answer is"; compares normalised texts.

    The extraction follows OpenCompass for zero-shot MATH; the normalisation is our own (``boxed.normalise_latex``).

    Args:
        response: decoded text, cut at its first stop token.
        reference: a solution with its ``\boxed{}``, or the bare answer.

    Returns:
        The grade; ``extracted`` is None when the response has neither.
    """
    given = extract_answer(reference)
    expected = normalise_latex(reference if given is None else given)
    return _graded(extract_answer(response), expected, normalise_latex)


GRADERS: dict[str, Grader] = {
    "gsm8k_strict": gsm8k_strict,
    "gsm8k_flexible": gsm8k_flexible,
    "math_boxed": math_boxed,
    "exact": exact,
}
"""The graders by name; the name is reported with every score."""


def find_grader(name: str) -> Grader:
    """Returns the grader with this name.

    Raises:
        UserError: there is no such grader; the message lists the names.
    """
    if name not in GRADERS:
        raise UserError(f"evaluate.grader: there is no grader {name!r}; choose one of {', '.join(GRADERS)}")
    return GRADERS[name]

"""Graders: how an answer is read off a response and compared with the reference.

Numbers of different graders do not compare (2 to 6 points apart for one checkpoint), so a grader is named with every
number it produced. A grader is a pure function of two texts; the caller has cut the response at its first stop token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from jaxblock.errors import UserError
from jaxblock.evaluation import boxed

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_BEFORE_ANSWER = re.compile(r".*#### ", re.DOTALL)
_FULL_STOP = re.compile(r"\.$")


class Graded(NamedTuple):
    """One graded response.

    Attributes:
        correct: the extracted answer equals the expected one after normalisation.
        extracted: the answer as it stands in the response, before normalisation; None if there is none.
        expected: the reference's answer after normalisation.
    """

    correct: bool
    extracted: str | None
    expected: str


Grader = Callable[[str, str], Graded]


def normalise(text: str) -> str:
    """What lm-eval's GSM8K tasks compare: no ``,`` or ``$``, nothing up to the last ``#### ``, no final dot, caseless.

    Outer white space is dropped as well, so that a reference that ends in a line break can be matched at all.

    Args:
        text: an extracted answer, or a whole reference (``worked answer #### 18``).

    Returns:
        The normalised text.
    """
    text = text.replace(",", "").replace("$", "")
    text = _BEFORE_ANSWER.sub("", text).strip()
    return _FULL_STOP.sub("", text).lower()


def _compared(extracted: str | None, reference: str) -> Graded:
    expected = normalise(reference)
    return Graded(extracted is not None and normalise(extracted) == expected, extracted, expected)


def gsm8k_strict(response: str, reference: str) -> Graded:
    """The number behind the first ``#### `` (lm-eval ``gsm8k``, filter ``strict-match``).

    Args:
        response: decoded text, cut at its first stop token.
        reference: the reference answer, with or without its ``#### ``.

    Returns:
        The grade; ``extracted`` is None when the response has no ``#### <number>``.
    """
    found = _STRICT.search(response)
    return _compared(found.group(1).strip() if found else None, reference)


def gsm8k_flexible(response: str, reference: str) -> Graded:
    """The last thing in the response that looks like a number (lm-eval ``gsm8k``, filter ``flexible-extract``).

    A lone digit counts; so does any run of two or more of ``$0-9.,``, as it does there (``...`` is such a run).

    Args:
        response: decoded text, cut at its first stop token.
        reference: the reference answer, with or without its ``#### ``.

    Returns:
        The grade; ``extracted`` is None when nothing looks like a number.
    """
    found = _NUMBER.findall(response)
    return _compared(found[-1].strip() if found else None, reference)


def exact(response: str, reference: str) -> Graded:
    """The whole response equals the whole reference, outer white space aside; nothing else is forgiven.

    Args:
        response: decoded text, cut at its first stop token.
        reference: the reference text.

    Returns:
        The grade; ``extracted`` is the stripped response, None when that is empty.
    """
    given, expected = response.strip(), reference.strip()
    return Graded(given == expected, given or None, expected)


def math_boxed(response: str, reference: str) -> Graded:
    r"""What stands in the last ``\boxed{}``, else behind the last "answer is"; compared as normalised text.

    The extraction is OpenCompass's for MATH in zero-shot; the normalisation is our own (``boxed.normalise``).

    Args:
        response: decoded text, cut at its first stop token.
        reference: a solution with its ``\boxed{}``, or the bare answer.

    Returns:
        The grade; ``extracted`` is None when the response gives no answer in either way.
    """
    extracted, given = boxed.answer(response), boxed.answer(reference)
    expected = boxed.normalise(reference if given is None else given)
    return Graded(extracted is not None and boxed.normalise(extracted) == expected, extracted, expected)


GRADERS: dict[str, Grader] = {
    "gsm8k_strict": gsm8k_strict,
    "gsm8k_flexible": gsm8k_flexible,
    "math_boxed": math_boxed,
    "exact": exact,
}
"""Graders by the name that is printed with every number."""


def grader(name: str) -> Grader:
    """Looks a grader up.

    Args:
        name: a key of ``GRADERS``.

    Returns:
        The grader.

    Raises:
        UserError: there is no such grader.
    """
    if name not in GRADERS:
        raise UserError(f"evaluate.grader: there is no grader {name!r}; choose one of {', '.join(GRADERS)}")
    return GRADERS[name]

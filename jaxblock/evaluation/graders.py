"""Defines graders, each of which extracts the answer from a response and compares it with the reference.

Scores of different graders cannot be compared (they differ by 2 to 6 points for one checkpoint), so every score is reported
with its grader's name. A built-in grader is a function of two texts; the caller cuts the response at its first stop token.
A user's function is given the record too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxblock.data.store.records import Record
from jaxblock.errors import UserError
from jaxblock.evaluation.boxed import extract_answer, normalise_latex
from jaxblock.evaluation.config import check_grader_name
from jaxblock.evaluation.hendrycks import normalise_hendrycks
from jaxblock.evaluation.symbolic import check_installed, shared_comparer
from jaxblock.evaluation.user_grader import UserFunction, describe_failure, load_function

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


class Graded(NamedTuple):
    """Holds the grade of one response.

    Attributes:
        correct: whether the extracted answer equals the expected one after normalisation.
        extracted: the answer as it is written in the response, before normalisation; None if there is none.
        expected: the reference's answer after normalisation.
        undecided: why two answers that differ as text could not be compared as mathematics (the response then counts as
            wrong); None for every other grade.
    """

    correct: bool
    extracted: str | None
    expected: str
    undecided: str | None = None


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
    r"""Grades the content of the last ``\boxed{}``, else the text after the last "answer is"; compares them as mathematics.

    Answers are equal if their normalised texts are, or if math-verify finds them equal: ``1 + x`` and ``x + 1``, ``0.5`` and
    ``1/2``. Words are compared as text, in any case, since as mathematics ``AB`` and ``BA`` would be equal products.

    Args:
        response: decoded text, cut at its first stop token.
        reference: a solution with its ``\boxed{}``, or the bare answer.

    Returns:
        The grade; ``extracted`` is None when the response has neither.
    """
    answer, extracted = _answer_of(reference), extract_answer(response)
    expected, given = normalise_latex(answer), normalise_latex(extracted or "")
    if not given or given == expected:
        return Graded(bool(given), extracted, expected)
    written = f"{extracted}{answer}"
    is_product = written.isalpha() and written.islower()  # such as ab
    if _is_word(given) and _is_word(expected) and not is_product:
        return Graded(given.casefold() == expected.casefold(), extracted, expected)
    # Of two numbers math-verify takes braces and round brackets alike.
    if {_brackets(given), _brackets(expected)} == {"set", "tuple"}:
        return Graded(False, extracted, expected)
    found = shared_comparer().compare((extracted or "").strip().rstrip("."), answer.strip().rstrip("."))
    return Graded(found.equal, extracted, expected, found.undecided)


def _answer_of(reference: str) -> str:
    """Returns the answer that a solution states; the whole text where it states none."""
    found = extract_answer(reference)
    return reference if found is None else found


def _is_word(text: str) -> bool:
    return len(text) > 1 and text.isalpha()


def _brackets(text: str) -> Literal["set", "tuple"] | None:
    """Returns whether a normalised answer lists elements in braces or in round brackets; None for anything else."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set"
    return "tuple" if re.fullmatch(r"\(.*,.*\)", text) else None


def hendrycks_math(response: str, reference: str) -> Graded:
    r"""Grades what ``math_boxed`` grades, but compares as text, by the rule published with the MATH data set.

    Args:
        response: decoded text, cut at its first stop token.
        reference: a solution with its ``\boxed{}``, or the bare answer.

    Returns:
        The grade; ``extracted`` is None when the response has neither a box nor "answer is".
    """
    return _graded(extract_answer(response) or None, normalise_hendrycks(_answer_of(reference)), normalise_hendrycks)


GRADERS: dict[str, Callable[[str, str], Graded]] = {
    "gsm8k_strict": gsm8k_strict,
    "gsm8k_flexible": gsm8k_flexible,
    "math_boxed": math_boxed,
    "hendrycks_math": hendrycks_math,
    "exact": exact,
}
"""The built-in graders by name; the name is reported with every score."""


@dataclass(frozen=True)
class Grader:
    """Grades responses; it is a built-in grader or a user's function.

    Attributes:
        name: the value of ``evaluate.grader``.
        version: the library that compares, or a hash of the user's file; None for rules that are fixed. Scores of two
            versions cannot be compared.
        function: the user's function; None for a built-in grader.
    """

    name: str
    version: str | None = None
    function: UserFunction | None = None

    def __call__(self, response: str, record: Record) -> Graded:
        """Grades a response to a record's prompt; the record's own response is the reference.

        Raises:
            UserError: the user's function failed, or returned neither a bool nor a ``Graded``.
        """
        if self.function is None:
            return GRADERS[self.name](response, record.response)
        told = f"{record.source}: evaluate.grader {self.name}"
        try:
            found = self.function(response, record.response, record)
        except (Exception, SystemExit) as error:
            raise UserError(f"{told} failed: {describe_failure(error, self.name.rpartition(':')[0])}") from error
        if isinstance(found, Graded):
            return found
        if not isinstance(found, bool | np.bool_):
            raise UserError(f"{told} returned {repr(found)[:100]} ({type(found).__name__}): return True or False")
        return Graded(bool(found), None, record.response)


def find_grader(name: str) -> Grader:
    """Returns the grader with this name, or the user's function that it names.

    Raises:
        UserError: there is no such grader or function, or a library that it needs is missing.
    """
    check_grader_name(name)
    if name not in GRADERS:
        function, version = load_function(name)
        return Grader(name, version, function)
    return Grader(name, check_installed() if name == "math_boxed" else None)

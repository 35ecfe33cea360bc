"""Defines config sections, whose fields declare which numbers they accept and whether a resumed run may change them."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from jaxblock.errors import UserError, shown

Alignment = Literal["same_position", "shifted"]
"""Which hidden state predicts the token at position i: the one at i, or the one at i - 1 (as in an autoregressive model)."""

SplitName = Literal["train", "validation", "test"]
"""The three sets of prepared records."""

OnResume = Literal["must_match", "may_change", "may_change_once_saved"]
"""Whether a resumed run may change a field.

`must_match`: never. `may_change`: always, because the field does not change what is learnt, up to rounding.
`may_change_once_saved`: once the run has a checkpoint, because the field is used only to begin a new run.
"""

Verb = Literal["prepare", "inspect", "train", "decode", "chat", "evaluate", "harness", "export", "plan"]
"""The commands of the command line."""

T = TypeVar("T")


class Range(NamedTuple):
    """Describes which numbers a field accepts.

    Attributes:
        says: the end of the error message, after "train.steps is 0: ".
        holds: tells whether a number is accepted.
    """

    says: str
    holds: Callable[[float], bool]


def between(low: int, high: int) -> Range:
    """Returns the range from ``low`` to ``high``, both included."""
    return Range(f"it must be from {low:,} to {high:,}", lambda x: low <= x <= high)


NOT_NEGATIVE = Range("it must be 0 or more", lambda x: x >= 0)
AT_LEAST_1 = Range("it must be at least 1", lambda x: x >= 1)
ABOVE_0 = Range("it must be above 0", lambda x: x > 0)
BELOW_1 = Range("it must be at least 0 and below 1", lambda x: 0 <= x < 1)
ABOVE_0_TO_1 = Range("it must be above 0, at most 1", lambda x: 0 < x <= 1)
BETWEEN_0_AND_1 = Range("it must be above 0 and below 1", lambda x: 0 < x < 1)
PROBABILITY = Range("it is a probability, from 0 to 1", lambda x: 0 <= x <= 1)
SHARE = Range("it is a share, from 0 to 1", lambda x: 0 <= x <= 1)
TOKENS = between(1, 1 << 24)
"""A length of a canvas or of one of its parts, in tokens."""
ROWS = between(1, 1 << 20)
"""The number of rows that are computed together."""

_LARGEST_INT = 2**31 - 1
_LARGEST_FLOAT, _SMALLEST_FLOAT = 3.4e38, 1.2e-38  # float32: smaller numbers are 0 on most devices


def _problem(value: Any, takes: Range | None) -> str | None:
    """Returns why a field cannot have a value, or None where it can.

    Whatever their range, whole numbers must fit 32 bits and others float32, and texts must be valid.
    """
    if isinstance(value, tuple):
        return next((problem for item in value if (problem := _problem(item, takes))), None)
    if isinstance(value, str):
        return None if value.isprintable() or _is_text(value) else "it holds a character that no text has"
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be a finite number"
    if takes is not None and not takes.holds(value):
        return takes.says
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        return f"it must be at most {_LARGEST_INT:,}"
    if isinstance(value, float) and value and not _SMALLEST_FLOAT <= abs(value) <= _LARGEST_FLOAT:
        return f"its size must be from {_SMALLEST_FLOAT} to {_LARGEST_FLOAT}, the numbers that float32 holds"
    return None


def has_type(value: Any, hint: Any) -> bool:
    """Tells whether a value has the type that a field of a section is annotated with; a whole number is a float too."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(has_type(value, one) for one in arguments)
    if origin is Literal:  # which of its words it is, is checked where it is read
        return any(type(value) is type(one) for one in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(has_type(item, arguments[0]) for item in value)
    if hint is None or hint is type(None):
        return value is None
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _is_text(value: str) -> bool:
    """Tells whether a text can be written as UTF-8 and names a file that can exist."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def setting(
    default: T,
    takes: Range | None = None,
    *,
    on_resume: OnResume | None = None,
    common: tuple[Verb, ...] = (),
    may_be_empty: bool = False,
) -> T:
    """Declares a field of a section.

    Args:
        default: the field's default; a field whose value is None is not checked.
        takes: the numbers that the field accepts; None for whatever its type allows.
        on_resume: whether a resumed run may change the field; None for the default of its section.
        common: the verbs whose short ``--help`` shows the field; ``--help-all`` shows every field.
        may_be_empty: whether an empty text means something.
    """
    metadata = {"takes": takes, "on_resume": on_resume, "common": common, "may_be_empty": may_be_empty}
    found: Any = dataclasses.field(default=default, metadata=metadata)
    return found  # typed as T, so that a type checker gives the field the type of its default


def may_change(default: T, takes: Range | None = None, *, common: tuple[Verb, ...] = ()) -> T:
    """Declares a field that a resumed run may always change, because it does not change what is learnt (up to rounding).

    Args:
        default: the field's default.
        takes: the numbers that the field accepts; None for whatever its type allows.
        common: the verbs whose short ``--help`` shows the field.
    """
    return setting(default, takes, on_resume="may_change", common=common)


@dataclass(frozen=True)
class Section:
    """Is the base class of the config's sections: frozen dataclasses that check their own values.

    A subclass gives the section's name in the YAML file: ``class TrainConfig(Section, name="train")``. It extends ``check``
    with checks that involve several of its fields; checks that involve two sections are in ``config/checks.py``.
    """

    section_name: ClassVar[str]
    on_resume: ClassVar[OnResume]

    def __init_subclass__(cls, name: str, on_resume: OnResume = "must_match") -> None:
        """Records the section's name, and whether a resumed run may change those fields that do not declare it themselves."""
        cls.section_name, cls.on_resume = name, on_resume

    def check(self) -> None:
        """Raises UserError where a field has a value of another type, or one that it does not accept."""
        hints = _hints(type(self))  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            fits = has_type(value, hints[field.name])
            problem = _problem(value, field.metadata.get("takes")) if fits else "its type is another"
            if isinstance(value, str) and not value.strip() and not field.metadata.get("may_be_empty"):
                problem = "it is empty: leave it out"
            require(problem is None, f"{self.section_name}.{field.name} is {shown(value)}: {problem}")

    @classmethod
    def common(cls, verb: str) -> set[str]:
        """Returns the fields that the short ``--help`` of a verb shows."""
        return {field.name for field in dataclasses.fields(cls) if verb in field.metadata.get("common", ())}

    @classmethod
    def changeable(cls, *, saved: bool) -> set[str]:
        """Returns the fields that a resumed run may change.

        Args:
            saved: whether the run has a checkpoint; without one the run begins again, so fewer fields may change.
        """
        allowed = {"may_change", "may_change_once_saved"} if saved else {"may_change"}
        return {
            field.name
            for field in dataclasses.fields(cls)
            if (field.metadata.get("on_resume") or cls.on_resume) in allowed
        }


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)

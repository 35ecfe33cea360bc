"""Defines `UserError`, the error shown to users: its text says what is wrong, where, and what to do instead."""

from __future__ import annotations

import warnings


class UserError(Exception):
    """Reports a mistake in input, configuration or environment that the user can correct.

    The command line prints its text without a traceback (``--traceback`` shows one) and exits with code 2.
    """


class EarlierVersionWarning(UserWarning):
    """Says that a folder was written by an earlier version of jaxblock, and what therefore cannot be checked or is assumed."""


def warn_of_earlier_version(folder: str, lacks: str) -> None:
    """Warns, once in a process, that a folder was written by an earlier version.

    Args:
        folder: the folder.
        lacks: what that version did not record.
    """
    text = f"{folder} was written by an earlier version of jaxblock, which did not record {lacks}"
    warnings.warn(text, EarlierVersionWarning, stacklevel=1)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, at most 300 characters, or the error's type where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

"""Defines `UserError`, the error shown to users: its text says what is wrong, where, and what to do instead."""

from __future__ import annotations

import importlib.metadata
import reprlib
import shlex
import sys
import warnings
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 8, 8, 8
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 120


class UserError(Exception):
    """Reports a mistake in input, configuration or environment that the user can correct.

    The command line prints its text without a traceback (``--traceback`` shows one) and exits with code 2. Characters that
    would control a terminal are escaped, since a message may quote names from a stranger's file.
    """

    def __init__(self, text: str) -> None:
        """Keeps the text of the message."""
        super().__init__(printable(text))


def printable(text: str) -> str:
    """Returns a text in which every character that is not printable, except for line ends, is escaped as in Python."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """Returns a value as Python writes it, shortened to be quoted in a message, however large or deep it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write whole numbers of thousands of digits
        return f"a number of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"


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


def install_command(package: str, *options: str) -> str:
    """Returns the command that installs a package in this environment; an environment made by uv has no pip.

    pip is looked for among the installed packages: asking the import system for it (``find_spec``) makes setuptools, on
    Python 3.11, take pip for running, after which this process can no longer import setuptools.
    """
    python = shlex.quote(sys.executable)
    installed = any(importlib.metadata.distributions(name="pip"))
    pip = f"{python} -m pip install" if installed else f"uv pip install --python {python}"
    return " ".join([pip, *options, shlex.quote(package)])


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, at most 300 characters, or the error's type where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

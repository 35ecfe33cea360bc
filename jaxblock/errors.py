"""The one error that people are meant to read: what was wrong, where, and what to do instead."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in input, configuration or environment that the user can mend.

    The command line prints its text without a traceback (``--traceback`` shows one) and exits with code 2.
    """

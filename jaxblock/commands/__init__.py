"""Defines the verbs of the command line. Each has one file with its ``Options`` and ``run``, which runs it.

``jaxblock.cli`` reads the options of every verb for ``--help``, which must not wait for JAX. So these
files import at the top only what the options need and what is quick to import; modules that import JAX, NumPy or a model are
imported inside the function that uses them. Results go to standard output, everything else to standard error.

A new verb is a file here with ``Options`` and ``run(options, config) -> exit code``, and one line in ``jaxblock.cli.VERBS``.
"""

from __future__ import annotations

import sys

from jaxblock.errors import printable


def say(text: str) -> None:
    """Prints a line to standard error."""
    print(printable(text), file=sys.stderr, flush=True)

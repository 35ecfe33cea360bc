"""Holds the verbs of the command line, one file each: the verb's ``Options``, and ``run``, which does the work.

``jaxblock.cli`` reads the options of every verb for ``--help``, which must not wait for JAX. So there is one rule for the
imports of these files: at the top stands what the options need, and what is quick to import; everything that imports JAX,
NumPy or a model is imported inside the function that uses it. Results go to standard output, everything else to standard
error.

A new verb is a file here with ``Options`` and ``run(options, config) -> exit code``, and one line in ``jaxblock.cli.VERBS``.
"""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Prints a line to standard error."""
    print(text, file=sys.stderr, flush=True)

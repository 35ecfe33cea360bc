"""Compares answers with math-verify, as a process of its own: one pair as a line of JSON in, true or false as a line out.

``symbolic.py`` starts this file, and kills it when an answer takes too long. It imports nothing of jaxblock.
"""

from __future__ import annotations

import json
import logging
import sys

_MEMORY = 4 << 30
"""The bytes of address space that an answer may take, where the system can limit it."""


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    except (ImportError, OSError, ValueError):  # Windows has no limits, and a host may allow less
        pass


def main() -> None:
    """Answers pairs (given, expected) until standard input ends; the first line says that it is ready."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    _limit_memory()
    latex = [LatexExtractionConfig()]
    parse("$1$", latex, parsing_timeout=None)  # the first use of the parser takes a moment
    print("ready", flush=True)
    for line in sys.stdin:
        # No time limits of the library's own: they use signals. The process is killed instead.
        given, expected = (parse(f"${text}$", latex, parsing_timeout=None) for text in json.loads(line))
        print(json.dumps(bool(verify(expected, given, allow_set_relation_comp=True, timeout_seconds=None))), flush=True)


if __name__ == "__main__":
    main()

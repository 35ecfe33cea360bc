"""Lists the packages that jaxblock needs beside JAX and what JAX itself needs, all of them, so that none is resolved later.

For a machine with JAX and no network: download these elsewhere, carry them over, install them without their dependencies.

    python -m benchmarks.accelerator.wheels > benchmarks/accelerator/wheels.txt
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("wheels.txt")
HEADER = """\
# What jaxblock needs beside JAX (jax, jaxlib and what they need), dependencies of dependencies included: for a machine that
# has JAX and no network. Made by `python -m benchmarks.accelerator.wheels`; tests/test_accelerator.py compares it with
# requirements.txt. docs/benchmarks.md says how to use it.
"""


def required() -> list[Requirement]:
    """Reads requirements.txt."""
    lines = (
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    )
    return [Requirement(line) for line in lines if line]


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """Returns the names of packages and of all that they need, by what the installed ones declare for this Python."""
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, "") for requirement in requirements]
    while waiting:
        requirement, asked_by = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": asked_by}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += [(Requirement(text), extra) for text in metadata.requires(name) or ()]
    return {name for name, _ in seen}


def wheels() -> list[str]:
    """Returns the names of the packages to carry, sorted."""
    found = required()
    jax = closure(requirement for requirement in found if canonicalize_name(requirement.name) == "jax")
    return sorted(closure(found) - jax)


def listed() -> list[str]:
    """Reads the names in wheels.txt."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    sys.stdout.write(HEADER + "".join(f"{name}\n" for name in wheels()))

"""Finds out which versions of jaxblock, Python and the libraries beneath it are running."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

PACKAGES = ("jaxblock", "jax", "flax", "optax", "orbax-checkpoint")
"""The installed packages whose versions are recorded, besides Python's."""


@functools.cache
def running_versions() -> dict[str, str]:
    """Returns the versions by name (``python``, ``jaxblock``, ``jax``, ...), and jaxblock's ``commit``; what is not known is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    commit = _commit()
    return found if commit is None else {**found, "commit": commit}


def _commit() -> str | None:
    """Returns the commit of the running code, with ``+changes`` where files differ from it; None where it is not known."""
    package = Path(__file__).resolve().parents[1]
    # Where the package lies in somebody else's repository (an environment inside a project), git does not know this file.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit, changed = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "-uno", ".")
        return commit if commit is None else f"{commit}{'+changes' if changed else ''}"
    try:
        installed = importlib.metadata.distribution("jaxblock").read_text("direct_url.json")
        found = json.loads(installed or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _git(folder: Path, *command: str) -> str | None:
    """Runs git in a folder and returns what it printed; None where it failed or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""The verb: starts the process that compiles, passes its progress on, and reads its plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from jaxblock.config.config import Config
from jaxblock.config.yaml import to_tree
from jaxblock.errors import UserError
from jaxblock.fit import topology as topologies


def run(
    config: Config,
    topology: str,
    *,
    model_config: str | None = None,
    decoder: bool = True,
    tries: int = 6,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Plans a run in a process of its own.

    Args:
        config: resolved and valid.
        topology: its name, such as ``v5e-16``.
        model_config: a config.json with the network's sizes; None for those of what the config starts from.
        decoder: plan the decoder too.
        tries: how many changes may be compiled where it does not fit.
        say: told what is being compiled.

    Returns:
        The plan (docs/plan.md).

    Raises:
        UserError: an unknown topology, sizes that are not known, or a compiler that failed.
    """
    where = topologies.parse_topology(topology)
    job = {
        "config": to_tree(config),
        "topology": topology,
        "model_config": model_config,
        "decoder": decoder,
        "tries": tries,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxblock.fit"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **topologies.compile_environment(where)},
    )
    last: list[str] = []
    listener = threading.Thread(target=_listen, args=(process.stderr, say, last), daemon=True)
    listener.start()
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        out = process.stdout.read()
        code = process.wait()
    finally:
        process.kill()
    listener.join(5)
    try:
        result: dict[str, Any] = json.loads(out)
    except json.JSONDecodeError as error:
        raise UserError(
            f"the compiler for {topology} ended with code {code} and no plan: {' | '.join(last[-5:]) or 'it said nothing'}"
        ) from error
    if "error" in result:
        raise UserError(result["error"])
    return result


def _listen(stream: Any, say: Callable[[str], None], last: list[str]) -> None:
    """Passes progress on; keeps the rest, which matters only if the process fails."""
    for line in stream:
        text = line.rstrip()
        if text.startswith("plan: "):
            say(text.removeprefix("plan: "))
        elif text:
            last.append(text[:300])
            del last[:-20]

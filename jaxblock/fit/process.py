"""Plans a run in a separate process: starts the process, shows its progress, and reads the plan that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxblock.config.config import Config
from jaxblock.config.yaml import to_tree
from jaxblock.errors import UserError
from jaxblock.fit.topology import compile_environment, parse_topology
from jaxblock.io.signals import sigterm_raises


def plan_in_process(
    config: Config,
    topology: str,
    *,
    model_config: str | None = None,
    decoder: bool = True,
    tries: int = 6,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Plans a run in a separate process whose JAX has the topology's devices.

    Args:
        config: the run's settings, checked.
        topology: the topology's name, such as ``v5e-16``.
        model_config: a config.json with the network's sizes; None for those of the checkpoint that the config starts from.
        decoder: whether to plan the decoder too.
        tries: the number of changes that may be compiled if the run does not fit.
        say: prints what is being compiled.

    Returns:
        The plan (docs/plan.md).

    Raises:
        UserError: the topology or the network's sizes are not known, or the compiler failed.
    """
    where = parse_topology(topology)
    job = {
        "config": to_tree(config),
        "topology": topology,
        "model_config": model_config,
        "decoder": decoder,
        "tries": tries,
    }
    out, code, last = _run_process(job, compile_environment(where), say)
    try:
        result: dict[str, Any] = json.loads(out)
    except json.JSONDecodeError as error:
        raise UserError(
            f"the compiler for {topology} ended with code {code} and no plan: {' | '.join(last[-5:]) or 'it printed nothing'}"
        ) from error
    if "error" in result:
        raise UserError(result["error"])
    return result


def _run_process(
    job: dict[str, Any], environment: dict[str, str], say: Callable[[str], None]
) -> tuple[str, int, list[str]]:
    """Runs the process that plans a job; returns (its output, its exit code, the last other lines on its standard error)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxblock.fit"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    last: list[str] = []
    listener = threading.Thread(target=_listen, args=(process.stderr, say, last), daemon=True)
    listener.start()
    ended = threading.Event()
    threading.Thread(target=_show_time, args=(ended, say), daemon=True).start()
    assert process.stdin is not None and process.stdout is not None
    try:
        with sigterm_raises():
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            out = process.stdout.read()
            code = process.wait()
    finally:
        ended.set()
        process.kill()
    listener.join(5)
    return out, code, last


def _show_time(ended: threading.Event, say: Callable[[str], None], every: float = 20.0) -> None:
    """Says every few seconds, until the compiler has ended, for how long it has worked."""
    begin = time.monotonic()
    while not ended.wait(every):
        say(f"still compiling: {time.monotonic() - begin:,.0f} s so far")


def _listen(stream: Any, say: Callable[[str], None], last: list[str]) -> None:
    """Passes lines of progress to ``say``, and keeps the last 20 other lines in ``last``, for the error if the process fails."""
    for line in stream:
        text = line.rstrip()
        if text.startswith("plan: "):
            say(text.removeprefix("plan: "))
        elif text:
            last.append(text[:300])
            del last[:-20]

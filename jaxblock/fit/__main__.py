"""Runs the process that compiles a plan: it reads a job as JSON from standard input and writes the plan as JSON.

Plans are compiled in a separate process because the number of host devices and the platforms must be set before JAX starts,
and because a compiler that fails may end its process.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from jaxblock.config.yaml import config_from_tree
from jaxblock.errors import UserError
from jaxblock.fit import topology
from jaxblock.fit.plan import plan_run


def main() -> int:
    """Plans one job. The exit code is 0, or 3 with ``{"error": ...}`` for a mistake that the user can correct."""
    # Libraries may print to standard output, where only the plan may be: what they print goes to standard error.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job: dict[str, Any] = json.load(sys.stdin)
    try:
        config = config_from_tree(job.pop("config"), "the job")
        where = topology.parse_topology(job.pop("topology"))
        result = plan_run(config, where, **job, say=lambda text: print(f"plan: {text}", file=sys.stderr, flush=True))
    except UserError as error:
        json.dump({"error": str(error)}, out)
        out.flush()
        return 3
    json.dump(result, out)
    out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs two real processes that train as one (launch/local_pod.sh), each with half of every parameter."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tests import runs

ROOT = Path(__file__).parents[1]
STEPS = 40
SETTINGS = f"--train.fsdp 2 --train.steps {STEPS} --train.save_every 10 --train.keep 9".split() + runs.QUIET
"""Flags of the undisturbed run (the fixture ``tiny_pod_run``) and of the runs compared with it; a later flag overrides them."""
JAXBLOCK = (sys.executable, "-m", "jaxblock")


@contextlib.contextmanager
def started(config: Path, run: Path, *flags: str, by: tuple[str, ...] = JAXBLOCK) -> Iterator[subprocess.Popen[str]]:
    """Starts the two processes; kills what is left of them when the block ends, or after 5 minutes.

    Their standard error comes through that of the script, each line with the number of its process in front.

    Args:
        config: the config file of the experiment.
        run: the run folder (``train.out``).
        flags: flags that follow `SETTINGS`.
        by: the program that each process runs; it passes its arguments on to jaxblock.
    """
    command = [str(ROOT / "launch" / "local_pod.sh"), "2", "--devices", "1", "--", *by]
    command += ["train", "--config", str(config), "--train.out", str(run), *SETTINGS, *flags]
    how = {"cwd": ROOT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **how) as group:
        # SIGTERM does not end processes that are stopped, or that wait for one that is.
        alarm = threading.Timer(300, os.killpg, [group.pid, signal.SIGKILL])
        alarm.start()
        try:
            yield group
        finally:
            alarm.cancel()
            if group.poll() is None:
                os.killpg(group.pid, signal.SIGKILL)

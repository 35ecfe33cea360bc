"""Kills real processes at any moment: nothing is lost, and the run ends like one that was never killed."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from jaxblock.cli import main
from jaxblock.errors import UserError
from jaxblock.training import start
from jaxblock.training.checkpoints import checksums
from jaxblock.training.checkpoints.reader import CheckpointReader
from tests import pod, runs

ROOT = Path(__file__).parents[2]
KILLS = 20


def _train(*flags: str, **environment: str) -> subprocess.Popen[bytes]:
    how = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "cwd": ROOT, "env": {**os.environ, **environment}}
    return subprocess.Popen([sys.executable, "-m", "jaxblock", "train", *flags], **how)


def _until(process: subprocess.Popen[bytes], seen: Callable[[str], bool]) -> str:
    """Reads what a process prints until ``seen`` is true of a line, or the process ends."""
    said = ""
    for line in process.stderr:
        said += line.decode()
        if seen(line.decode()):
            break
    return said


def _names(run: Path) -> list[str]:
    folder = run / "checkpoints"
    return os.listdir(folder) if folder.is_dir() else []


def _unfinished(run: Path, done: int) -> str | None:
    """Returns what the folder shows is being done to checkpoints after step ``done``; sealing is the last part of a save."""
    names = _names(run)
    if any(name.endswith(".deleting") for name in names):
        return "deletion"
    if any("tmp" in name for name in names):
        return "save"
    newer = [name for name in names if name.isdigit() and int(name) > done]
    return "sealing" if any(not checksums.is_sealed(run / "checkpoints" / name) for name in newer) else None


def _wait_for(process: subprocess.Popen[bytes], seen: Callable[[], bool]) -> None:
    """Waits, without sleeping because a deletion takes milliseconds, until ``seen`` is true or the process ends."""
    end = time.monotonic() + 2
    while process.poll() is None and time.monotonic() < end and not seen():
        pass


def _killed(aim: str, run: Path, flags: list[str], done: int, chance: random.Random) -> tuple[str, list[int], str]:
    """Starts a process and kills it at a random moment of a kind.

    Returns:
        What the kill interrupted, by what the folder holds afterwards; the steps that were printed; all that was printed.
    """
    every, keep = "50" if aim == "training" else "3", "1" if aim == "deletion" else "9"
    process, said = _train(*flags, "--train.save_every", every, "--train.keep", keep), ""
    if aim == "start":
        time.sleep(chance.uniform(0.5, 3))
    else:
        goal = min(done + chance.randint(4, 9), 118)
        said = _until(process, lambda line: bool(re.match(rf"step {goal}/", line)))
        signs = {
            "training": lambda: _unfinished(run, done) is None,
            "save": lambda: any("tmp" in name for name in _names(run)),
            "sealing": lambda: _unfinished(run, done) == "sealing",
            "deletion": lambda: any(name.endswith(".deleting") for name in _names(run)),
        }
        _wait_for(process, signs[aim])
        if aim == "save":
            time.sleep(chance.uniform(0, 0.1))
    process.kill()
    said += process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL and "is not used" not in said, said
    reached = [int(number) for number in re.findall(r"^step (\d+)/", said, re.M)]
    hit = "start" if not reached else _unfinished(run, done) or "training"
    if hit == "training" and reached[-1] % int(every) == 0:
        hit = "a save's first moments"  # perhaps: it was due, and nothing shows on the disk
    return hit, reached, said


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tiny_config, tiny_run, record_property):
    """SIGKILL at random moments of start and compiling, plain training, saves in the background, and deletions."""
    run, chance = tiny_config.parent / "killed20", random.Random(0)
    flags = ["--config", str(tiny_config), "--train.out", str(run), *runs.QUIET]
    aims = ["start"] * 4 + ["training"] * 5 + ["save"] * 5 + ["sealing"] * 3 + ["deletion"] * 3
    chance.shuffle(aims)
    lost: dict[str, list[int]] = {}
    done, begun = 0, time.monotonic()
    for aim in aims:
        hit, reached, said = _killed(aim, run, flags, done, chance)
        before, done = done, max(CheckpointReader(run).steps(), default=0)
        assert before <= done and (not reached or reached[0] == before + 1), (hit, before, done, said)
        lost.setdefault(hit, []).append(max(0, max(reached, default=0) - done))
    assert main(["train", *flags]) == 0
    told = f"{time.monotonic() - begun:.0f} s; steps done again after a kill, by where it hit: {lost}"
    record_property("kills", told)
    print(f"{KILLS} kills in {told}")
    assert sum(map(len, lost.values())) == KILLS == len(aims)
    assert len(lost.get("training", [])) >= 4 and len(lost.get("start", [])) >= 2, told
    assert len(lost.get("save", [])) + len(lost.get("sealing", [])) >= 4, told
    runs.check_same(run, tiny_run, ("train",))  # QUIET leaves evaluations out


def _pair(*flags: str) -> list[subprocess.Popen[bytes]]:
    """Starts two processes of a group, without the launch script, which would end one when it loses the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    group = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAXBLOCK_HEARTBEAT_TIMEOUT": "10"}
    # The last of two equal flags counts.
    one_device = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    return [_train(*flags, **group, XLA_FLAGS=one_device, JAX_PROCESS_ID=index) for index in "01"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_without_its_partner_ends_with_a_message_and_the_pair_goes_on(
    tiny_config, tiny_pod_run, record_property, loss
):
    """No collective can end. A killed process closes its connection; a stopped one, like a lost host, misses heartbeats."""
    run = tiny_config.parent / f"partner-{loss.name}"
    flags = ["--config", str(tiny_config), "--train.out", str(run), *pod.SETTINGS]
    first, second = _pair(*flags)
    _until(first, lambda line: line.startswith("step 25/"))  # the save at 20 has waited for the one at 10, in both
    second.send_signal(loss)
    begun = time.monotonic()
    try:
        said = first.communicate(timeout=120)[1].decode()
    finally:
        seconds = time.monotonic() - begun
        second.kill()
        second.communicate()
    # As a shell reports it: the runtime may abort.
    code = 128 - first.returncode if first.returncode < 0 else first.returncode
    record_property(f"seconds until the other one ended ({loss.name})", seconds)
    print(f"{loss.name}: the other one ended with {code} after {seconds:.1f} s")
    assert code == 134 and seconds < 40, said[-3000:]
    assert re.search("heartbeat|unhealthy|connection|Connection|closed by peer|process group", said), said[-3000:]

    whole = max(CheckpointReader(run).steps())
    assert 10 <= whole < pod.STEPS
    first, second = _pair(*flags)
    said, other = (process.communicate(timeout=120)[1].decode() for process in (first, second))
    assert (first.returncode, second.returncode) == (0, 0), said + other
    assert f"going on from step {whole} " in said and re.search(rf"^step {whole + 1}/", said, re.M), said
    runs.check_same(run, tiny_pod_run, ("train",))


def _flip(run: Path, step: str) -> None:
    """Damages the checkpoint of a step."""
    files = (run / "checkpoints" / step / "params").rglob("d/*")
    runs.flip_a_bit(max(files, key=lambda file: file.stat().st_size))


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tiny_config, tiny_run, run_copy, ran, monkeypatch):
    """Where all are damaged it begins again, if that is asked for."""
    _flip(run_copy, "120")
    assert "120 is damaged" in ran(f"decode --checkpoint {run_copy} 1+1?", 2).err
    ran(f"decode --checkpoint {run_copy} --step 100 1+1?")
    train = f"train --config {tiny_config} --train.out {run_copy} {' '.join(runs.QUIET)}"
    said = ran(train).err
    assert "checkpoints/120 is not used" in said and "going on from step 100" in said
    runs.check_same(run_copy, tiny_run, ("train",))  # QUIET leaves evaluations out

    _flip(run_copy, "100")
    _flip(run_copy, "120")
    assert "set train.resume to restart" in ran(train, 2).err
    create_state = Mock(side_effect=UserError("the first state is made"))
    monkeypatch.setattr(start, "create_state", create_state)
    said = ran(f"{train} --train.resume restart", 2).err
    assert "checkpoints/100 is not used" in said and "checkpoints/120 is not used" in said
    assert "the first state is made" in said and len(list(run_copy.rglob("damaged/*"))) == 3

"""Tests quickstart.sh and test.sh with a stand-in interpreter in .venv: what they run, skip, record, and print on failure."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.launch.conftest import LAUNCH, put

# Records pip and jaxblock calls; `evaluate` and `export` leave what they would leave; all else is the real Python.
INTERPRETER = f"""#!{sys.executable} -SE
import json, os, pathlib, sys
arguments = sys.argv[1:]
if arguments[:1] != ["-m"] or arguments[1] not in ("pip", "jaxblock", "pytest"):
    os.execv({sys.executable!r}, [{sys.executable!r}, *arguments])
if arguments == ["-m", "pip", "--version"]:
    sys.exit(0)
with open(pathlib.Path(__file__).parents[2] / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(arguments[1:]) + "\\n")
if os.environ.get("FAIL_AT") in arguments:
    sys.exit(3)
if arguments[1] == "jaxblock":
    flags = dict(zip(arguments[3::2], arguments[4::2]))
    folder = pathlib.Path(flags.get("--train.out") or flags.get("--out") or flags["--data.prepared"])
    folder.mkdir(parents=True, exist_ok=True)
    result = dict(train="metrics.jsonl", evaluate="problems.jsonl", export="config.json", prepare="manifest.json")
    if not (folder / result[arguments[2]]).exists():
        (folder / result[arguments[2]]).write_text("")
    if arguments[2] == "evaluate":
        summary = dict(pass_at_1=dict(correct=1, n=2, low=0.1, high=0.9), nelbo_per_token=dict(mean=1.5, se=0.25, n=2))
        if compare := flags.get("--evaluate.compare"):
            summary["compared_with"] = dict(file=compare, only_a=3, only_b=4, p_value=0.5)
        (folder / "summary.json").write_text(json.dumps(summary))
"""


class Checkout:
    """A copy of the scripts with a stand-in .venv, in a folder whose name needs quoting."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.out = self.root / "runs" / "quickstart"
        shutil.copytree(LAUNCH, self.root / "launch")
        for name in ("requirements.txt", "pyproject.toml"):
            shutil.copy(LAUNCH.parent / name, self.root)
        put(self.root / ".venv" / "bin" / "python", INTERPRETER)

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [self.root / "launch" / script, *arguments]
        return subprocess.run(command, cwd="/", env=os.environ | variables, capture_output=True, text=True)

    def calls(self) -> list[list[str]]:
        """Returns the recorded calls and forgets them."""
        record = self.root / "calls.jsonl"
        lines = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def flags(call: list[str]) -> dict[str, str]:
    return dict(zip(call[2::2], call[3::2], strict=True))


def test_the_phases_in_order_and_a_second_call_does_nothing_twice(checkout):
    out, configs = str(checkout.out), str(checkout.root / "configs")
    done = checkout.start("quickstart.sh", "--control")
    assert done.returncode == 0, done.stderr
    pip, *verbs = checkout.calls()
    assert pip[:2] == ["pip", "install"] and pip[-2:] == ["--editable", str(checkout.root)]
    assert [call[1] for call in verbs] == ["prepare", *("train", "evaluate") * 3, "export"]
    _, classical, before, blockwise, after, control, score, export = map(flags, verbs)
    assert classical["--train.out"] == before["--checkpoint"] == blockwise["--model.init_from"] == f"{out}/classical"
    assert control["--model.init_from"] == f"{out}/classical"
    assert control["--config"] == f"{configs}/quickstart_control.yaml"
    # One decoder for all scores, each compared with what it must beat.
    assert {f["--config"] for f in (before, after, score)} == {f"{configs}/quickstart_blockwise.yaml"}
    assert after["--evaluate.compare"] == f"{before['--out']}/problems.jsonl"
    assert score["--evaluate.compare"] == f"{after['--out']}/problems.jsonl"
    assert export == {"--checkpoint": f"{out}/blockwise", "--out": f"{out}/export"}
    assert {f["--data.prepared"] for f in map(flags, verbs[:-1])} == {f"{checkout.root}/prepared/quickstart"}
    assert len(re.findall(r"Pass@1 50\.0% \[10\.0%, 90\.0%\] \(1 of 2\), NELBO 1\.5", done.stdout)) == 3
    assert "against score_after: 4 problems right here alone, 3 right there alone" in done.stdout
    assert re.search(r"train, blockwise +0m0\ds +0\.0\d GiB", done.stdout)

    again = checkout.start("quickstart.sh", "--control")
    assert again.returncode == 0 and again.stdout.count("done already") == 4
    assert [call[1] for call in checkout.calls()] == ["prepare", "train", "train", "train"]
    # A score and an export older than their run are made anew.
    metrics = checkout.out / "blockwise" / "metrics.jsonl"
    os.utime(metrics, times=(metrics.stat().st_mtime + 100,) * 2)
    assert "older than the run" in checkout.start("quickstart.sh").stdout
    *calls, export = checkout.calls()
    assert [call[1] for call in calls] == ["prepare", "train", "train", "evaluate"]
    assert export[1] == "export" and export[-1] == "--overwrite"


def test_a_failing_phase_ends_it_with_its_exit_code(checkout):
    elsewhere = checkout.root / "else where"
    done = checkout.start("quickstart.sh", "--out", str(elsewhere), FAIL_AT="evaluate")
    assert done.returncode == 3 and "'score before' ended with exit code 3" in done.stderr
    *_, last = checkout.calls()
    assert last[1] == "evaluate" and flags(last)["--data.prepared"] == f"{elsewhere}/prepared"
    records = [json.loads(line) for line in (elsewhere / "phases.jsonl").read_text().splitlines()]
    assert [r["exit"] for r in records] == [0, 0, 3]


def test_installation_happens_again_only_when_its_inputs_change(checkout):
    pins = checkout.root / f"constraints-py{sys.version_info.major}{sys.version_info.minor}.txt"
    pins.touch()
    assert checkout.start("test.sh", "-k", "two words").returncode == 0
    pip, pytest_call = checkout.calls()
    assert pip[-1] == f"{checkout.root}[dev]" and pip[-4:-2] == ["--constraint", str(pins)]
    assert pytest_call == ["pytest", "-m", "not slow", "-n", "2", "--dist", "loadfile", "-k", "two words"]
    assert checkout.start("test.sh").returncode == 0
    with open(checkout.root / "requirements.txt", "a") as file:
        file.write("# another line\n")
    assert checkout.start("test.sh", FAIL_AT="pip").returncode == 2
    assert checkout.start("test.sh").returncode == 0
    assert [call[0] for call in checkout.calls()] == ["pytest", "pip", "pip", "pytest"]


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_too_old_a_python_is_told_plainly(checkout, script, tmp_path):
    shutil.rmtree(checkout.root / ".venv")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "env", "cat"):
        (tools / name).symlink_to(shutil.which(name) or "")
    version = '#!/bin/sh\nif [ "$1" = --version ]; then echo "Python 3.10.12"; else exit 1; fi\n'
    old = put(tools / "python3", version)
    named = checkout.start(script, PYTHON=str(old))
    assert named.returncode == 2 and f"PYTHON={old} is not a Python 3.11" in named.stderr
    found = checkout.start(script, PATH=str(tools), PYTHON="")
    assert found.returncode == 2 and "no Python 3.11 or newer" in found.stderr and "Python 3.10.12" in found.stderr
    assert checkout.start(script, "--help").returncode == 0


def test_a_signal_reaches_the_phase_and_its_exit_code_comes_back(tmp_path):
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); signal.pause()"
    record = tmp_path / "record.jsonl"
    command = [sys.executable, LAUNCH / "phases.py", "run", record, "train", sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)  # a terminal sends it to the phase as well; the wrapper must outlive it
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    assert json.loads(record.read_text())["exit"] == 75


def test_every_imported_package_is_a_requirement():
    text = "".join((LAUNCH.parent / name).read_text() for name in ("requirements.txt", "pyproject.toml"))
    declared = {canonicalize_name(name) for name in re.findall(r"([A-Za-z0-9_-]+)(?:\[\w+\])?>=", text)}
    source = "".join(file.read_text() for file in (LAUNCH.parent / "jaxblock").rglob("*.py"))
    imported = set(re.findall(r"^ *(?:import|from) (\w+)[\w.]*(?: as \w+| import .*)?$", source, re.M))
    assert {"jax", "yaml", "wandb"} <= imported
    owners = packages_distributions()
    for module in imported - sys.stdlib_module_names - {"jaxblock"}:
        names = {canonicalize_name(name) for name in owners.get(module, [module])}
        assert names & declared, f"jaxblock imports {module}, which is in neither requirements.txt nor an extra"

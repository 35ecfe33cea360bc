"""Tests quickstart.sh and test.sh with a stand-in interpreter in .venv: what they install, and what they run."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.launch.conftest import LAUNCH, put

# Records pip, jaxblock and pytest calls, with the folder where they are made; all else is the real Python.
INTERPRETER = f"""#!{sys.executable} -SE
import json, os, pathlib, sys
arguments = [one for one in sys.argv[1:] if one != "-P"]
if arguments[:1] != ["-m"] or arguments[1] not in ("pip", "jaxblock", "pytest"):
    os.execv({sys.executable!r}, [{sys.executable!r}, *arguments])
if arguments == ["-m", "pip", "--version"]:
    sys.exit(0)
with open(pathlib.Path(__file__).parents[2] / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(arguments[1:]) + "\\n")
if arguments[1] == "jaxblock":
    print("in", os.getcwd())
if os.environ.get("FAIL_AT") in arguments:
    sys.exit(3)
"""


class Checkout:
    """A copy of the scripts with a stand-in .venv, in a folder whose name needs quoting."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
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


def test_the_script_installs_and_hands_over_to_the_verb(checkout, tmp_path):
    """Without --out everything lies in the repository; a folder that is given is one from where the user stands."""
    done = checkout.start("quickstart.sh", "--control")
    assert done.returncode == 0 and f"in {checkout.root}\n" in done.stdout, done.stderr
    assert f"source '{checkout.root}/.venv/bin/activate'" in done.stdout.splitlines()[-1]
    pip, verb = checkout.calls()
    assert pip[:2] == ["pip", "install"] and pip[-2:] == ["--editable", str(checkout.root)]
    assert verb == ["jaxblock", "quickstart", "--control"]
    done = checkout.start("quickstart.sh", "--short", "--out", "else where", FAIL_AT="--short")
    assert done.returncode == 3 and "in /\n" in done.stdout and "activate" not in done.stdout
    assert checkout.calls() == [["jaxblock", "quickstart", "--out", "else where", "--short"]]


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

"""Builds the wheel as a release does, looks into it, and runs it where there is no checkout."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import jaxblock
from tests.runs import QUIET

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Returns the folder with a source distribution, and with the wheel that is built from it alone."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("build")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("jaxblock", "configs", "tests", *(file.name for file in ROOT.iterdir() if file.is_file())):
        (tree / name).symlink_to(ROOT / name)  # building leaves files beside these
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_wheel_holds_the_package_and_the_presets_and_nothing_else(built):
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    about = Parser().parsestr(inside[f"jaxblock-{jaxblock.__version__}.dist-info/METADATA"].decode())
    package = (file for file in (ROOT / "jaxblock").rglob("*") if file.is_file() and file.suffix != ".pyc")
    expected = {str(file.relative_to(ROOT)): file.read_bytes() for file in package}
    for file in (ROOT / "configs").rglob("*.yaml"):
        expected[f"jaxblock/presets/{file.relative_to(ROOT / 'configs')}"] = file.read_bytes()
    assert {name: content for name, content in inside.items() if ".dist-info/" not in name} == expected
    assert about["Version"] == jaxblock.__version__ and about["License-Expression"] == "Apache-2.0"
    described = about.get_payload()
    assert "# jaxblock" in described and "`docs/start.md`" in described
    assert re.findall(r"\]\((?!https://)", described) == []
    needs = {re.sub(r"\s", "", line).replace("'", '"') for line in about.get_all("Requires-Dist")}
    lines = (re.sub(r"\s|#.*", "", line) for line in (ROOT / "requirements.txt").read_text().splitlines())
    assert {line for line in lines if line} <= needs
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "requirements.txt"} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == jaxblock.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest and newest[1] == jaxblock.__version__


@pytest.mark.slow
def test_an_installed_wheel_works_without_the_checkout(built, tmp_path):
    """The wheel is installed into an environment of its own, which finds the dependencies of this one."""
    (wheel,), folder = built.glob("*.whl"), tmp_path / "venv"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def ran(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    ran(sys.executable, "-m", "venv", "--without-pip", folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    python, program = folder / "bin" / "python", folder / "bin" / "jaxblock"
    ran(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    where = ran(python, "-c", "import jaxblock; print(jaxblock.__file__)")
    assert Path(where.strip()).is_relative_to(packages)
    assert ran(program, "--version").strip() == jaxblock.__version__
    assert ran(program, "presets", "gsm8k_small") == (ROOT / "configs" / "gsm8k_small.yaml").read_text()
    assert "6,000 kept" in ran(program, "prepare", "--config", "quickstart_classical")
    small = "--model.d_model 16 --model.n_layers 1 --model.n_heads 2 --model.mlp_dim 16 --optimizer.warmup_steps 1"
    train = [program, "train", "--config", "quickstart_classical", "--train.steps", "2", *small.split(), *QUIET]
    assert "done: 2 steps" in ran(*train)

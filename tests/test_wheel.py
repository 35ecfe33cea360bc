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

ROOT = Path(__file__).parents[1]
BUILD = """
import os, sys, tarfile
from setuptools import build_meta
out = sys.argv[1]
source = build_meta.build_sdist(out)
tarfile.open(os.path.join(out, source)).extractall(out, filter="data")
os.chdir(os.path.join(out, source.removesuffix(".tar.gz")))
build_meta.build_wheel(out)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Returns the folder with a source distribution, and with the wheel that is built from it alone."""
    pytest.importorskip("setuptools", minversion="77")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("jaxblock", "configs", "tests", *(file.name for file in ROOT.iterdir() if file.is_file())):
        (tree / name).symlink_to(ROOT / name)  # building leaves files beside these
    done = subprocess.run([sys.executable, "-c", BUILD, out], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_wheel_holds_the_package_and_the_presets_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = Parser().parsestr(archive.read(f"jaxblock-{jaxblock.__version__}.dist-info/METADATA").decode())
        presets = {name: archive.read(name) for name in inside if name.startswith("jaxblock/presets/")}
    package = (file for file in (ROOT / "jaxblock").rglob("*") if file.is_file() and file.suffix != ".pyc")
    configs = ROOT / "configs"
    assert presets == {
        f"jaxblock/presets/{file.relative_to(configs)}": file.read_bytes() for file in configs.rglob("*.yaml")
    }
    assert inside == {str(file.relative_to(ROOT)) for file in package} | presets.keys()
    assert about["Version"] == jaxblock.__version__ and about["License-Expression"] == "Apache-2.0"
    described = about.get_payload()
    assert (
        "# jaxblock" in described
        and "`docs/start.md`" in described
        and re.findall(r"\]\((?!https://)", described) == []
    )
    needs = set(about.get_all("Requires-Dist"))
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    assert {re.sub(r"\s", "", line) for line in lines if line} <= {
        re.sub(r"\s", "", line).replace("'", '"') for line in needs
    }
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "requirements.txt"} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == jaxblock.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest and newest[1] == jaxblock.__version__


@pytest.mark.slow
def test_an_installed_wheel_works_without_the_checkout(built, tmp_path):
    """The wheel is installed into an environment of its own, which finds the dependencies of this one."""
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def ran(*arguments):
        command = [tmp_path / "venv" / "bin" / "jaxblock", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    where = subprocess.run([python, "-c", "import jaxblock; print(jaxblock.__file__)"], cwd=tmp_path, env=environment,
                           capture_output=True, text=True)  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(packages), where
    assert ran("--version").strip() == jaxblock.__version__
    assert ran("presets", "gsm8k_small") == (ROOT / "configs" / "gsm8k_small.yaml").read_text()
    assert "6,000 kept" in ran("prepare", "--config", "quickstart_classical")
    small = "--model.d_model 16 --model.n_layers 1 --model.n_heads 2 --model.mlp_dim 16 --optimizer.warmup_steps 1"
    ends = "--train.steps 2 --train.eval_every 0 --train.eval_problems 0 --train.eval_nelbo_rows 0"
    assert "done: 2 steps" in ran("train", "--config", "quickstart_classical", *small.split(), *ends.split())

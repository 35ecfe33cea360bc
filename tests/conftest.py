"""Sets up all tests: eight host devices, a compilation cache, shape checks at run time, and shared fixtures."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Once, on a busy machine, the eight devices waited for each other until XLA gave up after 40 s and ended the process. The cause
# was not found. As a precaution the devices no longer share a pool of threads for their arithmetic, and may wait longer.
os.environ["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false --xla_cpu_collective_call_terminate_timeout_seconds=300"
# A program is compiled as one piece: cutting it into 32 to compile them side by side takes a fifth more of the processors' time.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):  # later versions have no other emitters, and fail at an unknown flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # the older emitters compile twice as fast
# Most of the time goes into compiling. Optimising little halves it, and compiled programs are kept for later processes.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jaxblock-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest
from jaxtyping import install_import_hook

import tests.typechecks

# In tests, calls of functions are checked against their type and shape annotations.
install_import_hook("jaxblock", f"{tests.typechecks.__name__}.checked")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Returns the folder of reference data beside the checkout; where it is absent, the test is skipped."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def draw_curves() -> Iterator[Callable[..., None]]:
    """Lets runs that end draw no pictures, which takes a second each; returns the function that would draw them."""
    from jaxblock.commands import train

    draw = train.draw_curves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curves", lambda metrics_file: None)
        yield draw


TINY = """\
data: {{prepared: {folder}/prepared, train: {folder}/train.jsonl, test: {folder}/test.jsonl, validation_records: 8,
       template: plain, tokenizer_type: char, vocab_size: 300}}
canvas: {{prompt_len: 24, response_len: 16, block: 4}}
model: {{d_model: 16, n_layers: 2, n_heads: 2, mlp_dim: 32, tie_embeddings: true, scan_layers: true}}
optimizer: {{lr: 1.0e-2, warmup_steps: 2}}
train: {{out: {folder}/run, steps: 120, batch_size: 8, log_every: 1, eval_every: 60, eval_problems: 8, eval_nelbo_rows: 8,
        save_every: 100}}
decode: {{batch_size: 4}}
evaluate: {{nelbo_rows: 8}}
"""


Made = Callable[[str, Callable[[Path], object]], Path]


def _do(*command: str | Path, code: int = 0) -> None:
    """Runs a command line in this process, and checks its exit code."""
    from jaxblock.cli import main

    assert main(list(map(str, command))) == code


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Returns a function that makes a folder once for all of pytest's processes: the first makes it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        with (root / f"{name}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_size == 0:  # the file is empty until the folder is whole
                make(root / name)
                lock.write("made")
        return root / name

    return folder


@pytest.fixture(scope="session")
def tiny_config(made_once: Made) -> Path:
    """Returns the config file of the smallest experiment (one-digit sums, 10,000 parameters), with its data prepared."""

    def make(folder: Path) -> None:
        folder.mkdir()
        sums = itertools.product(range(10), repeat=2)
        rows = [{"question": f"{a}+{b}?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"} for a, b in sums]
        for name, test in (("train", False), ("test", True)):
            lines = [json.dumps(row) + "\n" for at, row in enumerate(rows) if (at % 7 == 0) == test]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        (folder / "tiny.yaml").write_text(TINY.format(folder=folder))
        _do("prepare", "--config", folder / "tiny.yaml")

    return made_once("tiny", make) / "tiny.yaml"


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Path, made_once: Made) -> Path:
    """Returns the run folder of that experiment, trained without interruption. Tests must not change it."""
    return made_once("tiny/run", lambda run: _do("train", "--config", tiny_config))


@pytest.fixture(scope="session")
def model(tiny_run: Path) -> Any:
    """Returns that run as a `jaxblock.Model`, for tests that have no model of their own."""
    import jaxblock

    return jaxblock.load(tiny_run)


@pytest.fixture(scope="session")
def tiny_export(tiny_run: Path, made_once: Made) -> Path:
    """Returns that run's export, a Hugging Face folder. Tests must not change it."""
    return made_once("tiny/export", lambda folder: _do("export", "--checkpoint", tiny_run, "--out", folder))


@pytest.fixture(scope="session")
def tiny_pod_run(tiny_config: Path, made_once: Made) -> Path:
    """Returns the run folder of two undisturbed processes (`tests.pod`). Tests must not change it."""
    from tests import pod, runs

    def make(run: Path) -> None:
        with pod.started(tiny_config, run) as group:
            said = "".join(group.stderr)
        assert group.returncode == 0, said
        assert [row["step"] for row in runs.rows(run)] == list(range(1, pod.STEPS + 1))

    return made_once("tiny/pod", make)


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """Returns a copy of the tiny run, for the test to change."""
    # Another test may be asking for the run to be trained further, which holds its lock for a moment.
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Returns a function that runs a command line in this process, checks its exit code, and returns what it printed."""

    def run(command: str, code: int = 0) -> Any:
        capsys.readouterr()
        _do(*shlex.split(command), code=code)
        return capsys.readouterr()

    return run

"""Eight host devices, a compilation cache, runtime shape checks, and the reference data where it is."""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Seen once, on a busy machine: eight devices waited for each other until XLA gave up, after 40 s, and ended the process. What
# held them was not found; they share no pool of threads for their arithmetic now, and have longer.
os.environ["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false --xla_cpu_collective_call_terminate_timeout_seconds=300"
if version("jaxlib").startswith("0.10."):  # later ones have no other emitters, and end at a flag that they do not know
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # the older emitters compile twice as fast
# Compile time dominates: little is optimised (half the time), and programs are kept between runs and processes.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jaxblock-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest
from jaxtyping import install_import_hook

# Public functions are checked against their annotations, in tests only.
install_import_hook("jaxblock", "beartype.beartype")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data at {SHARED}")
    return SHARED


TINY = """\
data: {{prepared: {folder}/prepared, train: {folder}/train.jsonl, test: {folder}/test.jsonl, validation_records: 8,
       template: plain, tokenizer_type: char, vocab_size: 300}}
canvas: {{prompt_len: 24, response_len: 16, block: 4}}
model: {{d_model: 16, n_layers: 2, n_heads: 2, mlp_dim: 32, tie_embeddings: true, scan_layers: false}}
optimizer: {{lr: 1.0e-2, warmup_steps: 2}}
train: {{out: {folder}/run, steps: 120, batch_size: 8, log_every: 1, eval_every: 60, eval_problems: 8, eval_nelbo_rows: 8,
        save_every: 100}}
decode: {{batch_size: 4}}
evaluate: {{nelbo_rows: 8}}
"""


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file of the smallest experiment (one-digit sums, 10,000 parameters) whose data are prepared."""
    from jaxblock.cli import main

    folder = tmp_path_factory.mktemp("tiny")
    sums = [(a, b) for a in range(10) for b in range(10)]
    rows = [json.dumps({"question": f"{a}+{b}?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}) + "\n" for a, b in sums]
    (folder / "train.jsonl").write_text("".join(row for at, row in enumerate(rows) if at % 7))
    (folder / "test.jsonl").write_text("".join(row for at, row in enumerate(rows) if not at % 7))
    (folder / "tiny.yaml").write_text(TINY.format(folder=folder))
    assert main(["prepare", "--config", str(folder / "tiny.yaml")]) == 0
    return folder / "tiny.yaml"


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Path) -> Path:
    """The run folder of that experiment, trained without interruption. To be read, never changed."""
    from jaxblock.cli import main

    assert main(["train", "--config", str(tiny_config)]) == 0
    return tiny_config.parent / "run"


@pytest.fixture(scope="session")
def tiny_pod_run(tiny_config: Path) -> Path:
    """The run folder of two processes that nothing disturbed (`tests.pod`). To be read, never changed."""
    from tests import pod

    run = tiny_config.parent / "pod"
    with pod.started(tiny_config, run) as group:
        said = "".join(pod.lines(group))
    assert group.returncode == 0, said
    assert [row["step"] for row in pod.rows(run)] == list(range(1, pod.STEPS + 1))
    return run

"""Real weights through the library and back to transformers: what benchmarks/smollm2.py does, in a few steps.

The weights are never downloaded: the test runs where the file is (benchmarks/smollm2.py says where it comes from).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ml_dtypes")

from benchmarks import gguf_checkpoint, smollm2  # noqa: E402

FEW = ("--train.eval-nelbo-rows", "0")


def test_rows_that_rotate_together_are_taken_apart() -> None:
    """GGUF has (first, second) pairs side by side in a head, transformers all firsts and then all seconds."""
    head, width, first = np.meshgrid(np.arange(2), np.arange(3), np.arange(2), indexing="ij")
    stored = np.stack([head, width, first], -1).reshape(12, 3)
    found = gguf_checkpoint.halves(stored, heads=2)
    assert found.tolist() == [[h, w, f] for h in range(2) for f in range(2) for w in range(3)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint as a Hugging Face folder."""
    for name in ("gguf", "torch", "transformers", "peft"):
        pytest.importorskip(name, reason="benchmarks/requirements.txt is not installed")
    file = smollm2.default_gguf()
    if not file.is_file():
        pytest.skip(f"no SmolLM2 weights at {file} (or where JAXBLOCK_SMOLLM2 says)")
    folder = tmp_path_factory.mktemp("smollm2")
    gguf_checkpoint.convert(file, folder / "smollm2")
    return folder


@pytest.fixture
def fast_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verbs' own processes run this network long enough for optimised programs to pay, and on one device."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")


@pytest.mark.slow
def test_under_a_causal_mask_it_is_what_transformers_runs(work: Path) -> None:
    found = smollm2.origin(work / "smollm2")
    assert found["answers"] == smollm2.BEGINNINGS
    assert found["difference"] <= 2e-5


@pytest.mark.slow
@pytest.mark.usefixtures("fast_programs")
def test_trained_adapters_are_exported_for_transformers_and_peft(work: Path, shared: Path) -> None:
    found = smollm2.lora(work / "smollm2", shared / "data" / "gsm8k", work, 4, *FEW)
    assert np.isfinite(found["losses"]).all() and len(found["losses"]) == 4
    assert found["moved"] > 1e-3  # else the rest would show nothing
    assert max(found[name] for name in ("merged_here", "merged_transformers", "adapter_peft")) <= 2e-5


@pytest.mark.slow
@pytest.mark.usefixtures("fast_programs")
def test_a_mask_token_is_added_and_exported(work: Path, shared: Path) -> None:
    found = smollm2.added(work / "smollm2", shared / "data" / "gsm8k", work, 2, *FEW)
    assert found["mask"] == 49152 and found["rows"] == 49152 + 64
    assert max(found[name] for name in ("merged_here", "merged_transformers")) <= 2e-5

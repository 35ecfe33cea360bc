"""Folders that an earlier version wrote stay readable: they resume, decode and load with today's code.

``fixtures/folders_e920755.tar.gz`` was written by commit e920755 (2026-11-28): ``prepared``, a run of the whole network
(``full``) and one of LoRA (``lora``, beneath it ``export``), each with its checkpoint of step 4 of 6. ``expected.json`` and
the ``*_metrics.jsonl`` hold what that commit computed: logits and decoded ids at step 4, and the losses of all six steps.
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxblock
from jaxblock.cli import main
from jaxblock.training.checkpoints.reader import CheckpointReader

ARCHIVE = Path(__file__).parent / "fixtures" / "folders_e920755.tar.gz"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked folders as the working directory: their configs name each other by relative paths."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_old_folders_load_and_decode(folders):
    """Runs (full and LoRA) and an export give the logits and the decoded ids that they gave when they were written."""
    expected = json.loads((folders / "expected.json").read_text())
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    for name in ("full", "lora", "export"):
        model = jaxblock.load(name, **({} if name == "export" else {"step": expected["steps_of_runs"]}))
        np.testing.assert_allclose(model.logits(ids)[:, ::4, ::48], expected[name]["logits"], atol=2e-5)
        found = model.decode(expected["prompts"], response_len=16, block=8, return_steps=True)
        assert found.ids.tolist() == expected[name]["decode"]
        assert found.nfe.tolist() == expected[name]["nfe"]


@pytest.mark.slow
def test_old_runs_resume(folders, monkeypatch):
    """Runs go on from their checkpoint of step 4 and have the losses that their last steps had in the earlier version."""
    # On one device, as they were begun: four rows do not split over the eight of the tests.
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])

    def losses(path: str) -> dict[int, float]:
        rows = map(json.loads, (folders / path).read_text().splitlines())
        return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}

    for name in ("full", "lora"):
        assert main(["train", "--config", f"{name}/config.yaml"]) == 0
        now, then = losses(f"{name}/metrics.jsonl"), losses(f"{name}_metrics.jsonl")
        assert list(now) == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose(list(now.values()), list(then.values()), rtol=1e-4)
        saved = CheckpointReader(folders / name).meta(6)["config"]
        assert saved["train"]["widths"] == "full" and saved["model"]["scan_layers"] is True  # as that version computed

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
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.observe.metrics import read_metrics


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The unpacked folders as the working directory: their configs name each other by relative paths."""
    with tarfile.open(Path(__file__).parent / "fixtures" / "folders_e920755.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_old_folders_load_and_decode(folders):
    """Runs (full and LoRA) and an export give the logits and the decoded ids that they gave when they were written."""
    expected = json.loads((folders / "expected.json").read_text())
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    for name in ("full", "lora", "export"):
        model = jaxblock.load(name, step="latest" if name == "export" else expected["steps_of_runs"])
        np.testing.assert_allclose(model.logits(ids)[:, ::4, ::48], expected[name]["logits"], atol=2e-5)
        found = model.decode(expected["prompts"], response_len=16, block=8, return_steps=True)
        assert (found.ids.tolist(), found.nfe.tolist()) == (expected[name]["decode"], expected[name]["nfe"])


@pytest.mark.slow
def test_old_runs_resume(folders, monkeypatch, ran):
    """Runs go on from their checkpoint of step 4 and have the losses that their last steps had in the earlier version."""
    # On one device, as they were begun: four rows do not split over the eight of the tests.
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    for name in ("full", "lora"):
        said = ran(f"train --config {name}/config.yaml").err
        assert "train.widths stays full" in said
        now, then = (read_metrics(file).train for file in (f"{name}/metrics.jsonl", f"{name}_metrics.jsonl"))
        assert [row["step"] for row in now] == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose([row["loss"] for row in now], [row["loss"] for row in then], rtol=1e-4)
        saved = CheckpointReader(folders / name).meta(6)["config"]
        assert saved["train"]["widths"] == "full" and saved["model"]["scan_layers"] is True  # as that version computed

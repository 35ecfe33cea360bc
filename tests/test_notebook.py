"""Runs the notebook of the documentation from top to bottom, with training cut short, in an empty folder."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "start.ipynb"
CUT = (
    "--train.steps 2 --train.save_every 2 --train.eval_every 0 --train.eval_problems 0 --train.eval_nelbo_rows 0 "
    "--train.log_every 1 --optimizer.warmup_steps 1"
)


def test_the_notebook_is_kept_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("JAXBLOCK_NOTEBOOK_FLAGS", CUT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # eight devices would compile eight times as much
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = [
        "".join(str(one.get("text", "")) for one in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"
    ]
    assert not any("jaxblock: " in text for text in told), told  # so begins the line of a mistake
    assert "6,000 kept" in told[1] and told[3].count("done: 2 steps") == told[4].count("done: 2 steps") == 1
    assert told[7].count("░") > 24 and told[8].count("forward passes") == 2
    assert "Pass@1" in told[9] and (tmp_path / "exports" / "notebook" / "config.json").is_file()

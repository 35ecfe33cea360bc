"""A study as people run it: real processes, one of them killed, and the compiler's count of a step's operations."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jaxblock.fit.process import plan_in_process
from jaxblock.fit.sizes import planned_architecture
from jaxblock.io.locks import only_writer
from jaxblock.study import amounts, results
from jaxblock.study.gradients.variance import REFERENCE
from jaxblock.study.study_file import read_study

pytestmark = pytest.mark.slow


def smaller(*tasks):
    """Returns the tree of configs/study/tiny.yaml with one seed, a smaller network, fewer records, and only some of its tasks."""
    tree = yaml.safe_load(Path("configs/study/tiny.yaml").read_text())
    tree["seeds"] = [4]
    tree["common"]["model"] |= {"d_model": 8, "n_layers": 1, "mlp_dim": 16}
    tree["tasks"] = {name: tree["tasks"][name] for name in tasks}
    tree["arms"] = {name: arm for name, arm in tree["arms"].items() if arm["task"] in tasks}
    for task in tree["tasks"].values():
        task["data"] |= {"builtin_train": 1500, "builtin_test": 8, "validation_records": 8}
    tree["scoring"] |= {"problems": 8, "nelbo_rows": 4}
    return tree


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """Returns the file of a cut form of configs/study/tiny.yaml: one seed, two arms, two budgets, and what else can be had of them."""
    tree = smaller("short", "chains")
    tree["arms"]["start"]["steps"] = 10
    tree["arms"]["blockwise"]["method"] = {"prompt_mask_rate": 0.15, "rate_floor": 0.2}
    changes = {
        "equal_compute": {"budgets": [5, 60], "primary": False},
        "pace": {"budgets": [60], "seeds": 1},
        "bound": {},
    }
    kept = tree["experiments"]
    tree["experiments"] = {name: {**kept[name], "arms": ["blockwise"], **new} for name, new in changes.items()}
    del tree["gradients"]  # of an experiment that is left out
    path = tmp_path_factory.mktemp("study") / "cut.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(spec, out):
    return [sys.executable, "-m", "jaxblock", "study", "run", str(spec), "--out", str(out), "--jobs", "2"]


def known(out):
    """Returns the results of a study without what a repetition does not repeat: times."""
    found = results.read_results(out)
    for result in found.values():
        result.pop("seconds")
        result.pop("settings")  # they name the folder
        for score in result["scores"].values():
            score.pop("decode_seconds")
    return found


def test_a_study_of_two_processes_and_one_that_is_killed_and_run_again_give_the_same_report(spec, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with only_writer(whole / "prepared"):
        both = [subprocess.Popen(command(spec, whole), stderr=subprocess.PIPE, text=True) for _ in range(2)]
        assert all(process.stderr.readline().endswith(": waiting until it ends\n") for process in both)
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    # One of them prepares both tasks, and one computes each score.
    assert sum(text.count("preparing") for text in said) == 2
    log = (whole / "logs" / "blockwise-s4.log").read_text()
    assert [log.count(f"scoring {point}\n") for point in ("5/by_8", "60/by_8", "60/at_50")] == [1, 1, 1]
    process = subprocess.Popen(command(spec, cut), stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stderr:
        if "blockwise-s4: started" in line:
            break
    while not (cut / "runs" / "blockwise-s4" / "checkpoints").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    begun = results.read_results(cut)["blockwise-s4"]  # it names the versions that began
    assert (begun["steps"], begun["scores"]) == (0, {})
    again = subprocess.run(command(spec, cut), capture_output=True, text=True, check=True)
    assert "start-s4: started" not in again.stderr and "blockwise-s4: done" in again.stderr
    assert known(cut) == known(whole)
    for out in (whole, cut):
        subprocess.run([sys.executable, "-m", "jaxblock", "study", "report", str(out)], check=True)
    text = (cut / "report.md").read_text()
    assert text == (whole / "report.md").read_text()
    assert "| blockwise | at_50 | 60 | 60 |" in text and "| same arm" in text
    other = spec.with_name("other.yaml")
    other.write_text(spec.read_text().replace("weight_decay: 0.01", "weight_decay: 0.02"))
    refused = subprocess.run(command(other, cut), capture_output=True, text=True)
    assert refused.returncode == 2 and "is the result of a cell with other settings than" in refused.stderr


def test_grids_gradients_draws_and_a_second_task_are_computed_and_reported(tmp_path, monkeypatch):
    """The kinds of experiments of configs/study/tiny.yaml that the other cut form lacks, with arms that start by themselves."""
    # A cell's process has one device, for which it compiles faster than for the eight of the tests.
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", ""))
    tree, at_once = smaller("chains", "sudoku"), {"seeds": 1, "primary": False}
    for arm in tree["arms"].values():
        arm.pop("start", None)
    del tree["decodings"]["on_short"]
    tree["common"]["optimizer"]["warmup_steps"] = 0  # 8 steps of one draw are one of eight draws
    kept = tree["experiments"]
    tree["experiments"] = {
        "block_size": {**kept["block_size"], **at_once, "arms": ["blockwise", "classical"], "decodings": ["by_8", "by_64"], "budgets": [8]},
        "gradients": {**kept["gradients"], "arms": ["blockwise"], "budgets": [8]},
        "draws": {**kept["draws"], **at_once, "budgets": [8]},
        "sudoku": {**kept["sudoku"], **at_once, "arms": ["blockwise_sudoku"], "budgets": [8]},
    }  # fmt: skip
    tree["gradients"] |= {"examples": 4, "bound_blocks": [1, 64]}
    spec, out = tmp_path / "cut.yaml", tmp_path / "study"
    spec.write_text(yaml.safe_dump(tree))
    subprocess.run(command(spec, out), check=True)
    subprocess.run([sys.executable, "-m", "jaxblock", "study", "report", str(out)], check=True)
    found = results.read_results(out)
    points = {name: list(result["scores"]) for name, result in found.items()}
    assert points == {
        "blockwise-s4": ["8/by_64", "8/by_8", "8/gradients"],
        "classical-s4": ["5/by_64", "5/by_8"],
        "draws_8-s4": ["1/by_8"],
        "blockwise_sudoku-s4": ["8/by_8"],
    }
    measured = found["blockwise-s4"]["scores"]["8/gradients"]
    assert measured["sizes"] == {**tree["gradients"]} and measured["variance"][REFERENCE]["all"]["ratio"] == [1, 0]
    assert len(measured["variance"]) == 34 and {"all", "embedding", "norms"} < measured["decomposition"].keys()
    assert len(measured["direction"]) == 12 and measured["tightness"]["1"]["gap"] == [0, 0]
    # After eight steps hardly anything is learnt: about log(320) nats a token, one after the other.
    assert measured["tightness"]["1"]["nelbo"][0] == pytest.approx(math.log(320), rel=0.1)
    text = (out / "report.md").read_text()
    for row in (
        "| draws_8 | by_8 | 8 | 1 | ",
        "| blockwise_sudoku | by_8 | 8 | 8 | ",
        "| classical | by_64 | 8 | ",
        "| blockwise, step 8 | 64 | ",
    ):
        assert row in text, row
    assert "4 of 4 cells are done" in text and text.count("](pictures/") == 4


@pytest.mark.parametrize("arm", ["blockwise", "classical"])
def test_counted_flops_are_those_of_the_compiled_step(arm):
    study = read_study("configs/study/tiny.yaml")
    config = study.config(arm)
    # Unrolled, the last layer would be computed at the active positions only, which the count leaves out on purpose.
    config = replace(config, model=replace(config.model, scan_layers=True))
    arch, _ = planned_architecture(config, None)
    plan = plan_in_process(config, "cpu-1", decoder=False, tries=0, say=lambda text: None)
    assert plan["train"]["flops"] == amounts.per_step(config, arch, "flops")

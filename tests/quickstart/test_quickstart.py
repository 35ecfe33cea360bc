"""Tests `jaxblock quickstart` with a stand-in for the verbs: what it runs, skips, records, and prints on failure."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from jaxblock.config.presets import presets
from jaxblock.quickstart import phases, picture, report, stages

# Records its arguments, and leaves what the verb would leave.
VERBS = """
import json, os, pathlib, sys
arguments = sys.argv[1:]
with open(pathlib.Path(__file__).with_name("calls.jsonl"), "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
if os.environ.get("FAIL_AT") in arguments:
    sys.exit(3)
flags = dict(zip(arguments[1::2], arguments[2::2]))
folder = pathlib.Path(flags.get("--train.out") or flags.get("--out") or flags["--data.prepared"])
folder.mkdir(parents=True, exist_ok=True)
result = dict(train="metrics.jsonl", evaluate="problems.jsonl", export="config.json", prepare="manifest.json")
if not (folder / result[arguments[0]]).exists():
    (folder / result[arguments[0]]).write_text("")
if arguments[0] == "evaluate":
    summary = dict(pass_at_1=dict(correct=1, n=2, low=0.1, high=0.9), nelbo_per_token=dict(mean=1.5, se=0.25, n=2))
    if compare := flags.get("--evaluate.compare"):
        summary["compared_with"] = dict(file=compare, only_a=3, only_b=4, p_value=0.5)
    (folder / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Returns a function that returns the calls of the stand-in so far and forgets them; the test runs in an empty folder."""
    stand_in, record = tmp_path / "verbs.py", tmp_path / "calls.jsonl"
    stand_in.write_text(VERBS)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(phases, "program", lambda: [sys.executable, str(stand_in)])

    def taken():
        lines = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    return taken


def flags(call):
    return dict(zip(call[1::2], call[2::2], strict=True))


def test_the_phases_in_order_and_a_second_call_does_nothing_twice(calls, ran, tmp_path):
    out, preset = "runs/quickstart", {name: str(file) for name, file in presets().items()}
    told = ran("quickstart --control").out
    verbs = calls()
    assert [call[0] for call in verbs] == ["prepare", *("train", "evaluate") * 3, "export"]
    _, classical, before, blockwise, after, control, score, export = map(flags, verbs)
    assert classical["--train.out"] == before["--checkpoint"] == f"{out}/classical"
    assert blockwise["--model.init_from"] == control["--model.init_from"] == f"{out}/classical"
    assert classical["--config"] == preset["quickstart_classical"]
    assert control["--config"] == preset["quickstart_control"]
    # One decoder for all scores, each compared with what it must beat.
    assert {f["--config"] for f in (before, after, score)} == {preset["quickstart_blockwise"]}
    for one, beaten in ((after, before), (score, after)):
        assert one["--evaluate.compare"] == f"{beaten['--out']}/problems.jsonl"
    assert export == {"--checkpoint": f"{out}/blockwise", "--out": f"{out}/export"}
    assert {f["--data.prepared"] for f in map(flags, verbs[:-1])} == {"prepared/quickstart"}
    assert len(re.findall(r"Pass@1 50\.0% \[10\.0%, 90\.0%\] \(1 of 2\), NELBO 1\.5", told)) == 3
    assert "against score_after: right here alone 4, right there alone 3" in told
    assert (tmp_path / f"here/{out}/scores.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"train, blockwise +0m0\ds +\d\.\d\d GiB", told) and "jaxblock quickstart --control" not in told

    assert ran("quickstart").out.count("done already") == 3
    assert [call[0] for call in calls()] == ["prepare", "train", "train"]
    # A score and an export older than their run are made anew.
    metrics = f"{out}/blockwise/metrics.jsonl"
    os.utime(metrics, times=(os.stat(metrics).st_mtime + 100,) * 2)
    told = ran("quickstart").out
    assert told.count("older than the run") == 2 and told.endswith("  jaxblock quickstart --control\n")
    again = calls()
    assert [call[0] for call in again] == ["prepare", "train", "train", "evaluate", "export"]
    assert again[-2][-1] == again[-1][-1] == "--overwrite"


def test_the_picture_has_a_row_for_each_score_with_its_interval(tmp_path):
    files = {name: tmp_path / f"{name}.json" for name in ("before", "after", "absent")}
    for name, correct, bound in (("before", 3, 0.5), ("after", 4, 0.25)):
        rate, nelbo = {"correct": correct, "n": 4, "low": 0.5, "high": 1.0}, {"mean": bound, "se": 0.0625}
        files[name].write_text(json.dumps({"pass_at_1": rate, "nelbo_per_token": nelbo}))
    solved, bounds = picture.draw_scores(files).axes
    assert [label.get_text() for label in solved.get_yticklabels()] == ["before", "after"]
    assert [text.get_text() for text in solved.texts] == ["75.0%", "100.0%"]
    assert [text.get_text() for text in bounds.texts] == ["0.5", "0.25"]
    ends = [bar.get_segments()[0][:, 0].tolist() for bar in (*solved.collections, *bounds.collections)]
    assert ends == [[0.5, 1.0], [0.5, 1.0], [0.4375, 0.5625], [0.1875, 0.3125]]


def test_a_failing_phase_ends_it_with_its_exit_code(calls, ran, monkeypatch, tmp_path):
    command = "quickstart --out 'else where'"
    monkeypatch.setenv("FAIL_AT", "evaluate")
    told = ran(command, 3)
    assert "'score before' ended with exit code 3" in told.err and "Try next" not in told.out
    last = calls()[-1]
    assert last[0] == "evaluate" and flags(last)["--data.prepared"] == "else where/prepared"
    record = tmp_path / "here" / "else where" / "phases.jsonl"
    assert [json.loads(line)["exit"] for line in record.read_text().splitlines()] == [0, 0, 3]
    monkeypatch.delenv("FAIL_AT")
    assert f"jaxblock {command} --control" in ran(command).out
    record.write_text("{}\n")
    assert "else where/phases.jsonl:1: not a phase" in ran(command, 2).err


def test_a_short_one_has_a_folder_of_its_own_and_few_steps(calls, ran, tmp_path):
    told = ran("quickstart --short").out
    assert "The installation works" in told and "Try next" not in told
    for call in calls():
        assert all(value in " ".join(call) for value in (stages.SHORT.get(call[0], ""), "runs/quickstart_short/"))
    assert "writes to a local folder" in ran("quickstart --out gs://bucket/x", 2).err
    assert "a file stands where a folder is needed" in ran(f"quickstart --out {tmp_path}/verbs.py", 2).err


def test_a_signal_reaches_the_phase_and_its_exit_code_comes_back(tmp_path):
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); signal.pause()"
    start = "import pathlib, sys; from jaxblock.quickstart import phases\n"
    start += "phases.program = lambda: [sys.executable]\n"
    start += "sys.exit(phases.run_phase(pathlib.Path(sys.argv[1]), 'train', ['-c', sys.argv[2]]))"
    record = tmp_path / "record.jsonl"
    command = [sys.executable, "-c", start, record, code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)  # a terminal sends it to the phase as well; the parent must outlive it
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    assert json.loads(record.read_text())["exit"] == 75


def test_a_phase_imports_the_jaxblock_that_runs_here_and_no_module_of_the_users_folder(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    (tmp_path / "jaxblock").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert phases.run_phase(tmp_path / "record.jsonl", "presets", ["presets"]) == 0
    (entry,) = phases.read_phases(tmp_path / "record.jsonl")
    assert entry["peak_bytes"] > 2**20 and report.format_phases([entry]).splitlines()[1].startswith("presets")

"""Tests everything that a pod keeps in a bucket, in the stand-in's: prepared data, a run, its metrics, an export."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxblock
from jaxblock.cli import main
from jaxblock.commands import train
from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes, write_bytes
from jaxblock.io.folders import check_vacant, folder_bytes, list_folder, new_folder
from jaxblock.io.json_lines import JsonlWriter
from jaxblock.io.paths import as_path, put_object
from jaxblock.io.remote import local_file, local_folder
from jaxblock.training.observe import metrics
from jaxblock.training.observe.metrics import MetricsWriter, restore_rows
from tests import pod, runs

from .conftest import Store  # noqa: TID252


def last_change(store: Store) -> str:
    """Returns the last change that was not one of a lock."""
    return [line for line in store.log if ".lock/" not in line][-1]


@contextlib.contextmanager
def make(text: str = "new", overwrite: bool = False) -> Iterator[Path]:
    """Makes a folder in the bucket; what is done inside ``with`` happens before it appears there."""
    with new_folder("gs://bucket/made", marker="MARK", overwrite=overwrite) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "data").write_text(text)
        (folder / "MARK").write_text("")
        yield folder


def test_a_folder_gets_its_marker_last_and_loses_it_first(store):
    for text in ("old", "new"):
        with make(text, overwrite=True):
            pass
    assert store.log[:3] == ["write made/sub/data", "write made/MARK", "delete made/MARK"]
    assert store.log[-2:] == ["write made/sub/data", "write made/MARK"]
    assert read_bytes("gs://bucket/made/sub/data") == b"new" and folder_bytes("gs://bucket/made") == 3
    assert local_file("gs://bucket/made/sub/data").read_text() == "new"
    with pytest.raises(UserError, match="gs://bucket/none"):
        read_bytes("gs://bucket/none")
    with pytest.raises(UserError, match="overwrite"):
        check_vacant("gs://bucket/made", marker="MARK")
    assert store.refused == []


def test_an_upload_that_fails_leaves_nothing_and_what_appears_meanwhile_stays(store):
    for fails in ("sub/data", "MARK"):
        store.failing = re.compile(fails)
        with pytest.raises(UserError, match="cannot write gs://bucket/made"), make():
            pass
        assert store.names() == []
    store.failing = None
    with pytest.raises(UserError, match="gs://bucket/made exists already"), make():
        store.put("bucket", "made/MARK", b"theirs", {})
    assert store.names() == ["made/MARK"]
    with pytest.raises(UserError, match="exists already"):
        write_bytes("gs://bucket/made/MARK", b"ours")
    with pytest.raises(FileExistsError):  # it appears just after `write_bytes` has looked
        put_object("gs://bucket/made/MARK", b"ours", overwrite=False)
    assert store.content("made/MARK") == b"theirs"


def test_a_large_file_goes_up_and_comes_down_in_pieces(store):
    content = np.random.default_rng(0).bytes(13 << 20)
    with make() as folder:
        (folder / "large").write_bytes(content)
    assert store.content("made/large") == content
    local = local_folder("gs://bucket/made", ["lar*"])
    assert [file.name for file in local.iterdir()] == ["large"] and (local / "large").read_bytes() == content


def test_what_another_process_writes_is_seen(store):
    assert list_folder("gs://bucket/run") == []
    store.put("bucket", "run/config.yaml", b"{}", {})
    assert [entry.name for entry in list_folder("gs://bucket/run")] == ["config.yaml"]
    assert as_path("gs://bucket/run/config.yaml").exists()


PATH = "gs://bucket/run/metrics.jsonl"


def append(lines: JsonlWriter, *steps: int) -> None:
    for step in steps:
        lines.append(json.dumps({"step": step, "kind": "train"}))


def steps_read() -> list[int]:
    return [row["step"] for row in metrics.read_metrics(PATH).train]


def losses(rows: Any) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows.train]


def test_a_growing_file_is_parts_written_once(store, tmp_path):
    lines = JsonlWriter(PATH, lambda line: True)
    append(lines, 1, 2)
    assert store.log == []  # they wait for others
    lines.flush()
    lines.flush()
    append(lines, 3)
    lines.flush()
    assert store.names() == ["run/metrics-000001.jsonl", "run/metrics-000002.jsonl"] and len(store.log) == 2
    for name in store.names():  # a copy on a local disk is read as well
        (tmp_path / Path(name).name).write_bytes(store.content(name))
    assert [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl").train] == steps_read() == [1, 2, 3]
    lines.close()
    assert store.names() == ["run/metrics-000003-all.jsonl"] and steps_read() == [1, 2, 3]
    assert store.log[-3:-2] == ["write run/metrics-000003-all.jsonl"]  # first the whole, then the parts go

    # A kill between the two, and the run goes on from step 2: nothing is lost, nothing is there twice.
    store.put("bucket", "run/metrics-000002.jsonl", b'{"step": 3, "kind": "train"}\n', {})
    assert steps_read() == [1, 2, 3]
    resumed = JsonlWriter(PATH, lambda line: json.loads(line)["step"] <= 2, period=0.0)
    assert steps_read() == [1, 2]
    append(resumed, 3, 4)
    assert steps_read() == [1, 2, 3, 4]
    assert store.refused == []


def test_a_store_that_is_away_for_a_while_loses_no_rows(store, caplog):
    lines = JsonlWriter(PATH, lambda line: True, period=0.0)
    store.failing = re.compile("metrics")
    append(lines, 1, 2)
    assert "wait for the next part" in caplog.text and store.names() == []
    with pytest.raises(UserError, match="cannot write gs://bucket/run/metrics-000001.jsonl"):
        lines.close()
    store.failing = None
    append(lines, 3)
    assert steps_read() == [1, 2, 3]


@pytest.mark.slow
def test_a_run_lives_in_a_bucket(store, tiny_config, tiny_run, tmp_path, draw_curves, monkeypatch):
    monkeypatch.setattr(train, "draw_curves", draw_curves)
    bucket = "gs://bucket/some folder"
    common = ["--config", str(tiny_config), "--data.prepared", f"{bucket}/prepared"]
    assert main(["prepare", *common]) == 0
    assert last_change(store) == "write some folder/prepared/manifest.json"  # the commit marker comes last

    out, begin = f"{bucket}/runs/one", len(store.log)
    flags = [*common, "--train.out", out, "--train.eval_every", "0"]
    assert main(["train", *flags, "--train.save_every", "40", "--train.keep", "2"]) == 0
    prefix = "write some folder/runs/one/"
    written = [line.removeprefix(prefix) for line in store.log[begin:] if line.startswith(prefix)]
    before_config = written[: written.index("config.yaml")]
    assert not any(name.startswith(("checkpoints", "metrics")) for name in before_config)
    steps = {m[1] for n in store.names() if (m := re.search(r"checkpoints/(\d+)/commit_success.txt", n))}
    assert steps == {"80", "120"} and store.names("some folder/runs/one/plots")

    rows, local = metrics.read_metrics(f"{out}/metrics.jsonl"), metrics.read_metrics(tiny_run / "metrics.jsonl")
    assert losses(rows) == losses(local)
    assert main(["train", *flags]) == 0  # finished: says so, changes nothing

    ours, theirs = jaxblock.load(out), jaxblock.load(tiny_run)
    ids = [[5, 6, 7, 8]]
    np.testing.assert_array_equal(ours.logits(ids), theirs.logits(ids))
    assert main(["export", "--checkpoint", out, "--out", f"{bucket}/export"]) == 0
    assert last_change(store) == "write some folder/export/config.json"
    np.testing.assert_array_equal(jaxblock.load(f"{bucket}/export").logits(ids), theirs.logits(ids))
    assert main(["evaluate", *common, "--checkpoint", out, "--out", f"{bucket}/score", "--evaluate.problems", "4"]) == 0
    assert store.log[-1] == "write some folder/score/summary.json"
    again = [*common, "--train.out", f"{bucket}/runs/two", "--train.steps", "2", "--model.init_from"]
    assert main(["train", *again, f"{bucket}/export", "--train.eval_problems", "0"]) == 0
    assert store.refused == []


@pytest.mark.slow
def test_adapters_live_in_a_bucket(store, tiny_config, tiny_run, capsys):
    """Their base in the bucket is first a copied run, then its export; what is made from them is in the bucket too."""
    for file in sorted(path for path in tiny_run.rglob("*") if path.is_file()):
        store.put("bucket", f"base/{file.relative_to(tiny_run).as_posix()}", file.read_bytes(), {})
    quiet = ["--train.eval_every", "0", "--train.eval_problems", "0", "--train.eval_nelbo_rows", "0"]
    lora = ["--lora.rank", "2", "--lora.alpha", "8", "--train.steps", "4", "--train.save_every", "2", *quiet]
    start = ["train", "--config", str(tiny_config), *lora]
    assert main(["export", "--checkpoint", "gs://bucket/base", "--out", "gs://bucket/base_export"]) == 0
    bases = {"on_run": "gs://bucket/base", "on_export": "gs://bucket/base_export"}
    for name, base in bases.items():
        assert main([*start, "--train.out", f"gs://bucket/{name}", "--model.init_from", base]) == 0, name
        assert json.loads(store.content(f"{name}/base.json"))["folder"] == base
    ids = [[5, 6, 7, 8]]
    model = jaxblock.load("gs://bucket/on_export")
    want = model.logits(ids)
    np.testing.assert_allclose(jaxblock.load("gs://bucket/on_run").logits(ids), want, atol=1e-5)
    older = jaxblock.load("gs://bucket/on_export", step=2).logits(ids)
    assert np.abs(older - want).max() > 0
    gone = store.names("on_export/checkpoints/4/")
    for name in gone:
        store.delete("bucket", name)
    go_on = [*start, "--train.out", "gs://bucket/on_export", "--model.init_from", "gs://bucket/base_export"]
    assert main(go_on) == 0
    np.testing.assert_array_equal(jaxblock.load("gs://bucket/on_export").logits(ids), want)

    for kind, out in (("merged", "merged"), ("adapter", "peft")):
        command = ["export", "--checkpoint", "gs://bucket/on_export", "--format", kind, "--out", f"gs://bucket/{out}"]
        assert main(command) == 0
    np.testing.assert_allclose(jaxblock.load("gs://bucket/merged").logits(ids), want, atol=2e-5)
    alone = jaxblock.load("gs://bucket/peft")  # adapter_config.json says where its base is
    np.testing.assert_array_equal(alone.logits(ids), want)

    store.put("bucket", "prompts.txt", b"3+4?\n1+1?\n", {})
    answers = []
    for checkpoint in ("on_export", "peft", "merged"):
        where = ["--checkpoint", f"gs://bucket/{checkpoint}", "--config", str(tiny_config)]
        out = f"gs://bucket/answers/{checkpoint}.jsonl"
        assert main(["decode", *where, "--file", "gs://bucket/prompts.txt", "--out", out]) == 0
        answers.append(read_bytes(out))
        score = ["--evaluate.problems", "2", "--evaluate.nelbo_rows", "2", "--out", f"gs://bucket/score/{checkpoint}"]
        assert main(["evaluate", *where, *score]) == 0
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 2
    assert main(["decode", "--checkpoint", "gs://bucket/on_export", "3+4?"]) == 0  # by the run's own config
    assert store.names("score/peft") == ["score/peft/problems.jsonl", "score/peft/summary.json"]
    assert store.refused == []


def test_rows_that_a_checkpoint_kept_are_written_once(store):
    """The store fails when the checkpoint is saved: before it comes back the run is killed, or just after."""
    for killed in ("before", "after"):
        path = f"gs://bucket/{killed}/metrics.jsonl"
        log = MetricsWriter(f"gs://bucket/{killed}", -1)
        for step in (1, 2, 3):
            store.failing = re.compile("metrics") if step > 1 else None
            log.write({"step": step, "kind": "train"})
            log.flush()
        kept = log.unwritten()
        assert [json.loads(row)["step"] for row in kept] == [2, 3]
        store.failing = None
        if killed == "after":
            log.write({"step": 4, "kind": "train"})
            log.flush()
        for _ in range(2):
            restore_rows(f"gs://bucket/{killed}", kept)
        MetricsWriter(f"gs://bucket/{killed}", 3).close()
        assert [row["step"] for row in metrics.read_metrics(path).train] == [1, 2, 3]


@pytest.mark.slow
def test_a_run_that_is_killed_while_its_rows_wait_loses_none(store, tiny_config, tiny_run):
    out = "gs://bucket/run"
    flags = ["train", "--config", str(tiny_config), "--train.out", out]
    store.failing = re.compile(r"/metrics-\d")
    command = [sys.executable, "-m", "jaxblock", *flags, "--train.save_every", "10"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not any("checkpoints/20/commit" in name for name in store.names()) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not store.names("run/metrics")
    store.failing = None
    assert main(flags) == 0
    ours, theirs = (metrics.read_metrics(f"{run}/metrics.jsonl") for run in (out, tiny_run))
    assert losses(ours) == losses(theirs)
    assert [row["step"] for row in ours.evals] == [row["step"] for row in theirs.evals]


AS_TWO_CLIENTS = """
if [ "$JAX_PROCESS_ID" = 1 ]; then
    export STORAGE_EMULATOR_HOST="${STORAGE_EMULATOR_HOST/127.0.0.1/localhost}"
    export TENSORSTORE_GCS_HTTP_URL="$STORAGE_EMULATOR_HOST"
fi
exec "$0" -m jaxblock "$@"
"""
"""The store learns which process it is that writes: process 1 calls it by another name."""


@pytest.mark.slow
def test_two_processes_live_in_a_bucket(store, tiny_config, tiny_pod_run):
    """They are stopped and resumed, and end like two that ran without a stop and wrote to a disk."""
    out, prepared = "gs://bucket/pod", "gs://bucket/prepared"
    assert main(["prepare", "--config", str(tiny_config), "--data.prepared", prepared]) == 0
    store.writers.clear()
    by = ("bash", "-c", AS_TWO_CLIENTS, sys.executable)
    flags = ["--data.prepared", prepared, "--train.save_every", "20"]
    with pod.started(tiny_config, out, *flags, by=by) as group:
        for line in group.stderr:
            if line.startswith("[0] step 12/"):
                group.terminate()
    assert group.returncode == 143
    stopped = max(int(name.split("/")[2]) for name in store.names("pod/checkpoints/"))
    assert 12 <= stopped < pod.STEPS
    with pod.started(tiny_config, out, *flags, by=by) as group:
        said = "".join(group.stderr)
    assert group.returncode == 0 and f"[0] going on from step {stopped} of {out}" in said, said
    runs.check_same(out, tiny_pod_run, ("train",))

    # Each has written its half of every checkpoint and sealed it; process 0 alone wrote what is one for all.
    for step in (stopped, 20, pod.STEPS):
        folder = f"pod/checkpoints/{step}"
        for process in range(2):
            assert store.names(f"{folder}/params/ocdbt.process_{process}/d/"), (step, process)
            assert store.names(f"{folder}/whole-{process}-of-2.json"), (step, process)
    assert store.names("pod/config.yaml") and store.names("pod/metrics-")
    callers = {"0": {"127.0.0.1"}, "1": {"localhost"}}
    for name, found in store.writers.items():
        process = re.search(r"/(?:\w+\.)?(?:process_|whole-)(\d)", name)
        assert found == callers[process[1] if process else "0"], name
    assert store.refused == []

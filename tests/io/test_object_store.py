"""Tests everything that a pod keeps in a bucket, in the stand-in's: prepared data, a run, its metrics, an export."""

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jaxblock
from jaxblock.commands import train
from jaxblock.errors import UserError
from jaxblock.io.files import check_absent, read_bytes, write_bytes
from jaxblock.io.folders import check_vacant, folder_bytes, list_folder, new_folder
from jaxblock.io.json_lines import JsonlWriter
from jaxblock.io.paths import as_path, put_object
from jaxblock.io.remote import local_file, local_folder
from jaxblock.training.observe.metrics import MetricsWriter, read_metrics, restore_rows
from tests import pod, runs

IDS = [[5, 6, 7, 8]]


@contextlib.contextmanager
def make(text: str = "new", overwrite: bool = False):
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
    store.put("made/theirs", b"")  # another process writes it, and it is seen here
    assert [entry.name for entry in list_folder("gs://bucket/made")] == ["MARK", "sub", "theirs"]
    assert as_path("gs://bucket/made/theirs").exists()


def test_an_upload_that_fails_leaves_nothing_and_what_appears_meanwhile_stays(store):
    for name in ("sub/data", "MARK"):
        store.failing = name
        with pytest.raises(UserError, match="cannot write gs://bucket/made"), make():
            pass
        assert store.names() == []
    store.failing = None
    with pytest.raises(UserError, match="gs://bucket/made exists already"), make():
        store.put("made/MARK", b"theirs")
    assert store.names() == ["made/MARK"]
    with pytest.raises(UserError, match="exists already"):
        write_bytes("gs://bucket/made/MARK", b"ours")
    with pytest.raises(FileExistsError):  # it appears just after `write_bytes` has looked
        put_object("gs://bucket/made/MARK", b"ours", overwrite=False)
    assert store.content("made/MARK") == b"theirs"


def test_a_file_of_the_store_is_looked_at_and_made_there_alone(store, tmp_path, monkeypatch):
    """Not in a folder of the disk that is named like its address."""
    monkeypatch.chdir(tmp_path)
    for content, overwrite in ((b"one", False), (b"two", True)):
        check_absent("gs://bucket/answers/mine.jsonl", overwrite=overwrite)
        write_bytes("gs://bucket/answers/mine.jsonl", content, overwrite=overwrite)
        assert read_bytes("gs://bucket/answers/mine.jsonl") == content
        with pytest.raises(UserError, match="exists already"):
            check_absent("gs://bucket/answers/mine.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_large_file_goes_up_and_comes_down_in_pieces(store):
    content = np.random.default_rng(0).bytes(13 << 20)
    with make() as folder:
        (folder / "large").write_bytes(content)
    assert store.content("made/large") == content
    local = local_folder("gs://bucket/made", ["lar*"])
    assert [file.name for file in local.iterdir()] == ["large"] and (local / "large").read_bytes() == content


PATH = "gs://bucket/run/metrics.jsonl"


def append(lines: JsonlWriter | MetricsWriter, *steps: int) -> None:
    for step in steps:
        row = {"step": step, "kind": "train"}
        lines.append(json.dumps(row)) if isinstance(lines, JsonlWriter) else lines.write(row)


def steps_read(path: str | Path = PATH) -> list[int]:
    return [row["step"] for row in read_metrics(path).train]


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
    assert steps_read(tmp_path / "metrics.jsonl") == steps_read() == [1, 2, 3]
    lines.close()
    assert store.names() == ["run/metrics-000003-all.jsonl"] and steps_read() == [1, 2, 3]
    assert store.log[-3:-2] == ["write run/metrics-000003-all.jsonl"]  # first the whole, then the parts go

    # A kill between the two, and the run goes on from step 2: nothing is lost, nothing is there twice.
    store.put("run/metrics-000002.jsonl", b'{"step": 3, "kind": "train"}\n')
    assert steps_read() == [1, 2, 3]
    resumed = JsonlWriter(PATH, lambda line: json.loads(line)["step"] <= 2, period=0.0)
    assert steps_read() == [1, 2]
    append(resumed, 3, 4)
    assert steps_read() == [1, 2, 3, 4]


def test_a_store_that_is_away_for_a_while_loses_no_rows(store, caplog):
    lines = JsonlWriter(PATH, lambda line: True, period=0.0)
    store.failing = "metrics"
    append(lines, 1, 2)
    assert "wait for the next part" in caplog.text and store.names() == []
    with pytest.raises(UserError, match="cannot write gs://bucket/run/metrics-000001.jsonl"):
        lines.close()
    store.failing = None
    append(lines, 3)
    assert steps_read() == [1, 2, 3]


@pytest.mark.parametrize("killed", ["before", "after"])
def test_rows_that_a_checkpoint_kept_are_written_once(store, killed):
    """The store fails when the checkpoint is saved: before it comes back the run is killed, or just after."""
    log = MetricsWriter("gs://bucket/run", -1)
    append(log, 1)
    log.flush()
    store.failing = "metrics"
    append(log, 2, 3)
    log.flush()
    kept = log.unwritten()
    assert [json.loads(row)["step"] for row in kept] == [2, 3]
    store.failing = None
    if killed == "after":
        append(log, 4)
        log.flush()
    for _ in range(2):
        restore_rows("gs://bucket/run", kept)
    MetricsWriter("gs://bucket/run", 3).close()
    assert steps_read() == [1, 2, 3]


@pytest.mark.slow
def test_a_run_lives_in_a_bucket(store, tiny_config, tiny_run, ran, draw_curves, monkeypatch):
    """It is killed while its rows wait, since the store takes none, and loses none of them."""

    def last_change() -> str:
        return [line for line in store.log if ".lock/" not in line][-1]

    bucket = "gs://bucket/a"
    data = f"--config {tiny_config} --data.prepared {bucket}/prepared"
    ran(f"prepare {data}")
    assert last_change() == "write a/prepared/manifest.json"  # the commit marker comes last

    command, begun = f"train {data} --train.out {bucket}/run --train.save_every 20 --train.keep 2", len(store.log)
    store.failing = r"/metrics-\d"
    with subprocess.Popen([sys.executable, "-m", "jaxblock", *command.split()], stderr=subprocess.DEVNULL) as process:
        while not any("checkpoints/20/commit" in name for name in store.names()) and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None and not store.names("a/run/metrics")
        process.kill()
    store.failing = None
    written = [line.removeprefix("write a/run/") for line in store.log[begun:] if line.startswith("write a/run/")]
    assert not any(name.startswith(("checkpoints", "metrics")) for name in written[: written.index("config.yaml")])
    monkeypatch.setattr(train, "draw_curves", draw_curves)
    for _ in range(2):  # the second time it is finished: says so, changes nothing
        ran(command)
    steps = {m[1] for n in store.names() if (m := re.search(r"checkpoints/(\d+)/commit_success.txt", n))}
    assert steps == {"100", "120"} and store.names("a/run/plots")
    runs.check_same(f"{bucket}/run", tiny_run, ("train",))
    evals = [[row["step"] for row in read_metrics(f"{run}/metrics.jsonl").evals] for run in (f"{bucket}/run", tiny_run)]
    assert evals[0] == evals[1]

    ran(f"export --checkpoint {bucket}/run --out {bucket}/export")
    assert last_change() == "write a/export/config.json"
    ours, theirs = (jaxblock.load(folder).logits(IDS) for folder in (f"{bucket}/export", tiny_run))
    np.testing.assert_array_equal(ours, theirs)
    ran(f"evaluate {data} --checkpoint {bucket}/run --out {bucket}/score --evaluate.problems 4")
    assert store.log[-1] == "write a/score/summary.json"
    again = f"--train.out {bucket}/again --train.steps 2 --train.eval_problems 0 --model.init_from {bucket}/export"
    ran(f"train {data} {again}")


@pytest.mark.slow
def test_adapters_live_in_a_bucket(store, tiny_config, tiny_run, ran):
    """Their base in the bucket is first a copied run, then its export; what is made from them is in the bucket too."""
    for file in tiny_run.rglob("*"):
        if file.is_file():
            store.put(f"base/{file.relative_to(tiny_run).as_posix()}", file.read_bytes())
    ran("export --checkpoint gs://bucket/base --out gs://bucket/base_export")
    lora = f"--lora.rank 2 --lora.alpha 8 --train.steps 4 --train.save_every 2 {' '.join(runs.QUIET)}"

    def adapt(base: str, out: str) -> np.ndarray:
        ran(f"train --config {tiny_config} {lora} --train.out gs://bucket/{out} --model.init_from gs://bucket/{base}")
        assert json.loads(store.content(f"{out}/base.json"))["folder"] == f"gs://bucket/{base}"
        return jaxblock.load(f"gs://bucket/{out}").logits(IDS)

    want = adapt("base_export", "on_export")
    np.testing.assert_allclose(adapt("base", "on_run"), want, atol=1e-5)
    assert np.abs(jaxblock.load("gs://bucket/on_export", step=2).logits(IDS) - want).max() > 0
    for name in store.names("on_export/checkpoints/4/"):
        store.delete(name)
    np.testing.assert_array_equal(adapt("base_export", "on_export"), want)

    for kind, out in (("merged", "merged"), ("adapter", "peft")):
        ran(f"export --checkpoint gs://bucket/on_export --format {kind} --out gs://bucket/{out}")
    np.testing.assert_allclose(jaxblock.load("gs://bucket/merged").logits(IDS), want, atol=2e-5)
    # adapter_config.json says where its base is.
    np.testing.assert_array_equal(jaxblock.load("gs://bucket/peft").logits(IDS), want)

    store.put("prompts.txt", b"3+4?\n1+1?\n")
    for name in ("on_export", "peft"):
        where = f"--config {tiny_config} --checkpoint gs://bucket/{name}"
        ran(f"decode {where} --file gs://bucket/prompts.txt --out gs://bucket/answers/{name}.jsonl")
    answers = store.content("answers/peft.jsonl")
    assert answers == store.content("answers/on_export.jsonl") and len(answers.splitlines()) == 2
    ran(f"evaluate {where} --evaluate.problems 2 --evaluate.nelbo_rows 2 --out gs://bucket/score")
    assert store.names("score") == ["score/problems.jsonl", "score/summary.json"]
    ran("decode --checkpoint gs://bucket/on_export 3+4?")  # by the run's own config


AS_TWO_CLIENTS = """
if [ "$JAX_PROCESS_ID" = 1 ]; then
    export STORAGE_EMULATOR_HOST="${STORAGE_EMULATOR_HOST/127.0.0.1/localhost}"
    export TENSORSTORE_GCS_HTTP_URL="$STORAGE_EMULATOR_HOST"
fi
exec "$0" -m jaxblock "$@"
"""
"""The store learns which process it is that writes: process 1 calls it by another name."""


@pytest.mark.slow
def test_two_processes_live_in_a_bucket(store, tiny_config, tiny_pod_run, ran):
    """They are stopped and resumed, and end like two that ran without a stop and wrote to a disk."""
    out, prepared = "gs://bucket/pod", "gs://bucket/prepared"
    ran(f"prepare --config {tiny_config} --data.prepared {prepared}")
    store.writers.clear()
    flags = ["--data.prepared", prepared, "--train.save_every", "20"]
    how = {"by": ("bash", "-c", AS_TWO_CLIENTS, sys.executable)}
    with pod.started(tiny_config, out, *flags, **how) as group:
        for line in group.stderr:
            if line.startswith("[0] step 12/"):
                group.terminate()
    assert group.returncode == 143
    stopped = max(int(name.split("/")[2]) for name in store.names("pod/checkpoints/"))
    assert 12 <= stopped < pod.STEPS
    with pod.started(tiny_config, out, *flags, **how) as group:
        said = "".join(group.stderr)
    assert group.returncode == 0 and f"[0] going on from step {stopped} of {out}" in said, said
    runs.check_same(out, tiny_pod_run, ("train",))

    # Each has written its half of every checkpoint and sealed it; process 0 alone wrote what is one for all.
    for step in (stopped, 20, pod.STEPS):
        for process in range(2):
            for part in (f"params/ocdbt.process_{process}/d/", f"whole-{process}-of-2.json"):
                assert store.names(f"pod/checkpoints/{step}/{part}"), (step, part)
    assert store.names("pod/config.yaml") and store.names("pod/metrics-")
    callers = {"0": {"127.0.0.1"}, "1": {"localhost"}}
    for name, found in store.writers.items():
        process = re.search(r"/(?:\w+\.)?(?:process_|whole-)(\d)", name)
        assert found == callers[process[1] if process else "0"], name

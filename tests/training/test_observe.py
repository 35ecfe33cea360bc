"""Tests what a run tells of itself: where its time goes, metrics, progress, arithmetic per second, and trackers."""

import importlib.metadata
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from rich.console import Console

import jaxblock
from jaxblock.config.config import Config
from jaxblock.config.yaml import config_from_tree
from jaxblock.errors import UserError, printable
from jaxblock.models.families import registry
from jaxblock.models.spec import matmul_flops_per_token
from jaxblock.parallel.chips import CHIPS
from jaxblock.training.observe import goodput, metrics, throughput, trackers
from jaxblock.training.observe.goodput import CAUSES, EarlierTime, Goodput, read_earlier_time
from jaxblock.training.observe.progress import TrainProgress
from jaxblock.training.observe.samples import in_one_line
from jaxblock.training.observe.throughput import Work
from jaxblock.training.observe.trackers import Trackers
from tests import runs
from tests.models.networks import make_arch

# Where time goes


def test_time_is_split_without_rest(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    def compile_(clock: Goodput, seconds: float, inside: float) -> None:
        wait(seconds)
        clock._note("/jax/core/compile/jaxpr_trace_duration", inside)  # of another function, inside
        clock._note("/jax/core/compile/backend_compile_duration", seconds)
        clock._note("/jax/something/else", seconds)

    with Goodput() as clock:
        wait(3)
        compile_(clock, 5.0, inside=2.0)
        clock.started()
        with clock.during("evaluation"):
            wait(1)
            compile_(clock, 4.0, inside=0.5)
        for cause in ("data", "step"):
            clock.charge("step")
            wait(2)
            clock.charge(cause)
            wait(10)
        assert clock.training() == 24
        for seconds in (6.0, 7.0, 50.0):
            clock.note_step(seconds)
        with clock.during("save"):
            wait(1)
        clock.add_earlier(EarlierTime({"step": 100.0, "lost": 3.0}, lost_seconds=5.0, lost_steps=2))
        row = clock.row(9)
    lost = 3 + 5 + 2 * 7
    assert row["seconds"] == dict(start=3, compile=9, step=122, data=2, evaluation=1, save=1, lost=lost)
    assert row["step_seconds"] == 7.0 and row["goodput"] == pytest.approx(122 / 160)
    told = "goodput 76%: step 122 s, lost 22 s, compile 9.0 s, start 3.0 s, data 2.0 s, evaluation 1.0 s, save 1.0 s"
    assert goodput.describe(row) == told


def test_compiling_is_heard_until_the_clock_is_closed():
    with Goodput() as clock:
        clock.started()
        jax.jit(lambda x: jnp.sin(x) * 17.25 + jax.jit(jnp.cos)(x))(1.0)
        assert clock.row(0)["seconds"]["compile"] > 0
    before = clock._seconds["compile"]
    jax.jit(lambda x: jnp.sin(x) * 18.25)(1.0)
    assert clock._compiles == [] and clock._seconds["compile"] == before


# Metrics


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "kind": "train", "loss": 5.0 / (1 + step)} | more


def write(path: Path, rows: list[dict[str, Any]], end: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end, encoding="utf-8")
    return path


def test_what_a_killed_process_did_in_vain(tmp_path):
    def told(at: int, pace: float | None = None, **seconds: float) -> dict[str, Any]:
        return {"step": at, "kind": "goodput", "seconds": seconds, "step_seconds": pace}

    path = tmp_path / "metrics.jsonl"
    assert read_earlier_time(path, -1) == EarlierTime({})
    rows = [told(0, start=4.0, evaluation=1.0), *map(train, range(1, 11))]
    rows += [told(10, 2.0, start=4.0, evaluation=1.0, step=20.0), *map(train, range(11, 26))]
    rows += [told(25, 2.5, start=4.0, evaluation=3.0, step=50.0, save=1.0), *map(train, range(26, 30))]
    write(path, rows, '{"step": 30, "ki')
    at_ten = read_earlier_time(path, 10)
    assert at_ten.seconds == {**dict.fromkeys(CAUSES, 0.0), "start": 4.0, "evaluation": 1.0, "step": 20.0}
    assert at_ten[1:] == (58.0 - 25.0, 4, 2.5)  # known up to step 25, then four steps
    assert read_earlier_time(path, 29)[1:] == (0.0, 0, 2.5)
    assert read_earlier_time(path, -1) == EarlierTime({}, 58.0, 4, 2.5)  # nothing was saved, so everything is lost


def test_a_resumed_run_replaces_the_steps_it_repeats_and_a_cut_line_is_left_out(tmp_path):
    rows = [train(1), train(2), train(3, loss=9.0), {"step": 3, "kind": "eval"}, train(2, loss=7.0), train(3, loss=8.0)]
    got = metrics.read_metrics(write(tmp_path / "m.jsonl", rows, '{"step": 2, "ki'))
    assert [(r["step"], r["loss"]) for r in got.train] == [(1, 2.5), (2, 7.0), (3, 8.0)]
    assert [r["step"] for r in got.evals] == [3]
    with pytest.raises(UserError, match="cannot read the metrics"):
        metrics.read_metrics(tmp_path / "absent.jsonl")


def test_a_resumed_run_sets_broken_lines_aside(tmp_path):
    """They are told once and kept in a file of their own; a line that a kill cut off is made again, and is not kept."""
    broken = [b"garbage\r\xff", b'{"step": "1", "kind": "train"}', b"[" * 100_000, b""]
    rows = [json.dumps(train(step)).encode() for step in (1, 2, 3)]
    said: list[str] = []
    for _ in range(2):  # a kill in between, before the lines were removed
        lines = [broken[0], rows[0], *broken[1:], rows[1], rows[2], b'{"step": 4, "ki']
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
        writer = metrics.MetricsWriter(tmp_path, 2, said.append)
        writer.write(train(3))
        writer.close()
        assert [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl").train] == [1, 2, 3]
        assert (tmp_path / metrics.BROKEN_FILE).read_bytes() == b"".join(line + b"\n" for line in broken)
    assert "metrics.jsonl:1 is not a row of metrics" in said[0] and "nor are 3 other lines" in said[0]
    metrics.MetricsWriter(tmp_path, 2, said.append).close()
    assert len(said) == 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": -1}, "'step' is not a step"),
        ({"step": True}, "'step' is not a step"),
        ({"step": 10**400}, "'step' is not a step"),
        ({"kind": 3}, "'kind' is not a text"),
        ({"kind": "goodput"}, "no 'seconds'"),
        ({"kind": "goodput", "seconds": {"step": "long"}}, "'seconds' is not an object of numbers"),
        ({"step_seconds": []}, "'step_seconds' is not a number or null"),
        ({"loss_by_block": [[1.0], [2.0, 3.0]]}, "'loss_by_block' is not pairs of numbers"),
        ({"loss_by_count": [[1.0, 10**400]]}, "'loss_by_count' is not pairs of numbers"),
        ({"nelbo_per_token": 3.0}, "'nelbo_per_token' is not an object of numbers"),
        ({"pass_at_1": {"n": 3}}, "'pass_at_1' is not an object of correct, n, low and high"),
    ],
)
def test_a_damaged_field_is_named(tmp_path, change, problem):
    """It would end a run, or a plot, that reads it."""
    path = write(tmp_path / "metrics.jsonl", [train(1) | change, train(2, loss="nan", loss_by_block=[["nan", 1]])])
    with pytest.raises(UserError, match=f"{path}:1: {problem}"):
        metrics.read_metrics(path)
    assert read_earlier_time(path, 2).lost_seconds == 0
    metrics.MetricsWriter(tmp_path, 2).close()
    assert [row["step"] for row in metrics.read_metrics(path).train] == [2]


def test_series_skip_what_is_not_finite_and_breakdowns_are_pooled_before_dividing():
    steps, values = metrics.series([train(1), train(2, loss=float("nan")), train(3, loss=None), train(4)], "loss")
    assert steps.tolist() == [1, 4] and values.tolist() == [2.5, 1.0]
    rows = [train(1, loss_by_block=[[1.0, 1.0], [0.0, 0.0]]), train(2, loss_by_block=[[9.0, 3.0], [0.0, 0.0]])]
    np.testing.assert_array_equal(metrics.pooled(rows, "loss_by_block"), [2.5, np.nan])  # not the mean of 1 and 3
    assert metrics.pooled([train(1)], "loss_by_block").size == 0


# Progress


def shown(**terminal: Any) -> str:
    """Returns what a run shows that is resumed at step 900; a step takes 2 s, and an evaluation 1,000,000 s."""
    out, now = io.StringIO(), [0.0]
    with TrainProgress(
        910, start=900, every=4, console=Console(file=out, _environ={}, **terminal), clock=lambda: now[0]
    ) as progress:
        assert progress.seconds_left() is None
        for step in range(901, 911):
            now[0] += 2.0
            progress.train(step, 1.0 / (step - 900) if step % 2 == 0 else None, 1234.5)
            if step == 905:
                now[0] += 1e6
                progress.evaluation(905, nelbo=5.25, pass_at_1=(0, 8))
        progress.evaluation(910, pass_at_1=(5, 8))
        progress.say("saved to runs/[x]")
    return out.getvalue()


def test_progress_is_plain_lines_without_a_terminal_and_a_bar_on_one():
    """The time left counts from where the run was resumed, and leaves evaluations out."""
    assert shown(width=120).splitlines() == [
        "step 904/910  loss 0.25  1,234 tok/s  0:12 left",
        "evaluation at step 905: NELBO 5.25  Pass@1 0.0% (0/8)",
        "step 908/910  loss 0.125  1,234 tok/s  0:04 left",
        "step 910/910  loss 0.1  1,234 tok/s  0:00 left",
        "evaluation at step 910: Pass@1 62.5% (5/8)",
        "saved to runs/[x]",
    ]
    for width in (60, 120):
        text = shown(force_terminal=True, width=width)
        assert "910/910" in text and "evaluation at step 905" in text and "saved to runs/[x]" in text


# Arithmetic


def test_arithmetic_against_the_peak(monkeypatch):
    arch = make_arch(vocab_size=13)
    table, work = registry.param_table(arch), Work(rows=2, positions=20, predicted=8)
    per_token = matmul_flops_per_token(table, arch, 10, head=False)
    head = 2 * arch.vocab_size * arch.d_model
    assert throughput.model_flops(table, arch, work) == 3 * (20 * per_token + 8 * head)
    attention = per_token - matmul_flops_per_token(table, arch, 0, head=False)
    assert throughput.model_flops(table, arch, work, {}) == 2 * (20 * per_token + 8 * head) + 20 * attention
    mesh = Mesh(jax.devices()[:4], ("data",))
    assert throughput.peak_flops(mesh) is None and throughput.utilisation(1e12, 2.0, None) == {}
    monkeypatch.setattr(throughput, "chip_of", lambda device: CHIPS["v5e"])
    assert throughput.peak_flops(mesh) == 4 * 197e12
    assert throughput.utilisation(197e12, 2.0, 4 * 197e12) == {"model_flops_per_second": 98.5e12, "mfu": 0.125}


# Trackers

ROWS: list[dict[str, Any]] = [
    {"step": 1, "kind": "train", "loss": 2.0, "grad_norm": float("nan"), "loss_by_block": [[1.0, 2.0]]},
    {"step": 2, "kind": "eval", "nelbo_per_token": {"mean": 1.5, "se": 0.1}, "grader": "exact"},
]
SAMPLE = {"step": 2, "prompt": "1+1?\n" * 30, "response": "\x1b[31m```\n# 2", "reference": "2"}
SAMPLES: list[dict[str, Any]] = [{**SAMPLE, "index": at, "correct": at == 1} for at in (0, 1)]


def _config(out: object, **fields: Any) -> Config:
    return config_from_tree({"train": {"out": str(out), **fields}}, "here")


def _stand_in(monkeypatch: pytest.MonkeyPatch, *begun: Any) -> Mock:
    """Puts a stand-in in W&B's place, which begins one run after the other; returns its ``init``."""
    init = Mock(side_effect=begun)
    module = SimpleNamespace(init=init, Settings=dict, Table=lambda columns, data: {"columns": columns, "data": data})
    monkeypatch.setitem(sys.modules, "wandb", module)
    return init


def test_a_tracker_that_fails_stops_nothing_and_is_told_of_once(tmp_path, monkeypatch):
    gone = [None, *[RuntimeError("the service has gone\nand more")] * 9]
    first, second = Mock(**{"log.side_effect": gone}), Mock(**{"log.side_effect": gone})
    init = _stand_in(monkeypatch, first, second)
    config, told = _config(tmp_path, wandb="online", wandb_project="p", tensorboard=True), []
    for begin in (-1, 1):
        log = Trackers(config.train, {"a": 1}, begin, told.append)
        for row in (*ROWS, *ROWS[1:]):
            log.write(row)
        log.write_samples(SAMPLES)
        log.flush()
        log.close()
    assert told == ["W&B: metrics may be missing from here on (the service has gone); training goes on"] * 2
    logged = [given.args[0] for given in first.log.call_args_list]
    values = {"step": 1, "train/loss": 2.0, "train/grad_norm": float("nan")}
    assert logged[0] == pytest.approx(values, nan_ok=True)
    assert logged[1] == {"step": 2, "eval/nelbo_per_token/mean": 1.5, "eval/nelbo_per_token/se": 0.1}
    assert logged[3]["samples"]["data"][1] == [2, 1, SAMPLE["prompt"], SAMPLE["response"], "2", True]
    assert first.define_metric.call_args == call("*", step_metric="step") and first.finish.called
    given, again = (begun.kwargs for begun in init.call_args_list)
    wanted = {"project": "p", "name": tmp_path.name, "mode": "online", "config": {"a": 1}, "resume": "allow"}
    assert wanted.items() <= given.items() and given["id"] == again["id"]  # a resumed run continues the same page
    # The JSON lines have every row, and the resume has removed the rows and the samples that came again.
    assert [row["step"] for row in runs.rows(tmp_path, "eval")] == [2, 2]
    assert [row["grad_norm"] for row in runs.rows(tmp_path, "train")] == ["nan"] * 2
    assert list(map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())) == SAMPLES
    events = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert b"samples/problem 1" in events and b"    \x1b[31m```\n    # 2" in events  # in a block that it cannot end


def test_samples_of_a_run_are_the_first_problems_of_each_evaluation(tiny_run):
    rows = [json.loads(line) for line in (tiny_run / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["index"]) for row in rows] == [(step, at) for step in (0, 60, 120) for at in (0, 1)]
    model = jaxblock.load(tiny_run)
    assert model.generate([row["prompt"] for row in rows[-2:]]) == [row["response"] for row in rows[-2:]]
    assert rows[-1].keys() >= {"reference", "correct", "extracted", "expected", "nfe", "stopped"}
    assert in_one_line({**SAMPLES[0], "response": ""}) == f"  problem 0, wrong: ...{' 1+1?' * 12} => (empty)"
    line = printable(in_one_line({**SAMPLES[1], "prompt": "a [b]?", "response": SAMPLE["response"] * 20}))
    assert line.startswith("  problem 1, right: a [b]? => \\x1b[31m``` # 2") and line[-3:] == "..." and len(line) < 180
    assert [_config("x", eval_problems=n).train.sample_count for n in (0, 1, 64)] == [0, 1, 2]


def test_a_disk_that_is_full_stops_nothing_and_is_told_of_each_time(tmp_path, monkeypatch):
    told: list[str] = []
    log = Trackers(_config(tmp_path).train, {}, -1, told.append)
    full, append = Mock(side_effect=UserError("the disk is full")), log._lines._lines.append
    for then in (full, full, append, full):
        monkeypatch.setattr(log._lines._lines, "append", then)
        log.write(ROWS[0])
    assert told == ["the disk is full; training goes on, and the rows wait"] * 2


def test_what_a_tracker_needs_is_said_before_the_run_starts(tmp_path, monkeypatch):
    def check(have: set[str], said: str | None, out: object = tmp_path, **fields: Any) -> None:
        monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: sys.__spec__ if name in have else None)
        monkeypatch.setattr(importlib.metadata, "distributions", lambda name: {name} & have)
        if said is None:
            return trackers.check_trackers(_config(out, **fields).train)
        with pytest.raises(UserError, match=said):
            trackers.check_trackers(_config(out, **fields).train)

    monkeypatch.setattr(sys, "executable", "/my env/python")
    check({"pip"}, "train.wandb needs wandb: '/my env/python' -m pip install wandb$", wandb="offline")
    advice = "train.tensorboard needs tensorboardX: uv pip install --python '/my env/python' tensorboardX$"
    check(set(), advice, tensorboard=True)  # as in an environment that uv made
    check(set(), None)
    both, bucket = {"wandb", "tensorboardX"}, "gs://bucket/run"
    local = "writes to a local folder, and train.out is gs://bucket/run"
    check(both, f"^train.tensorboard {local}", bucket, tensorboard=True)
    check(both, f"^train.wandb offline {local}", bucket, wandb="offline")
    check(both, None, bucket, wandb="online")
    _stand_in(monkeypatch, RuntimeError("api_key not configured"))
    said = r"did not begin \(api_key not configured\); run `wandb login` or set WANDB_API_KEY .*, or set train.wandb to offline$"
    closed, close = [], trackers.TensorBoard.close
    monkeypatch.setattr(trackers.TensorBoard, "close", lambda board: closed.append(board) or close(board))
    with pytest.raises(UserError, match=said):
        Trackers(_config(tmp_path, wandb="online", tensorboard=True).train, {}, -1, print)
    assert len(closed) == 1  # its thread and its file do not stay


def test_advice_to_install_leaves_imports_as_they_were():
    program = "from jaxblock.errors import install_command; install_command('x'); import setuptools"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0

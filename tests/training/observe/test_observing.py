"""Trackers, the profiler's window, where the time goes, and how much arithmetic is done."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from jaxblock.cli import main
from jaxblock.config.config import Config
from jaxblock.config.yaml import config_from_tree
from jaxblock.errors import UserError
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.spec import matmul_flops_per_token
from jaxblock.parallel.chips import CHIPS
from jaxblock.training.observe import goodput, metrics, throughput, trackers
from jaxblock.training.observe.goodput import CAUSES, EarlierTime, Goodput, read_earlier_time
from jaxblock.training.observe.throughput import Work
from jaxblock.training.observe.trackers import Trackers

ROWS: list[dict[str, Any]] = [
    {"step": 1, "kind": "train", "loss": 2.0, "grad_norm": float("nan"), "loss_by_block": [[1.0, 2.0]]},
    {"step": 2, "kind": "eval", "nelbo_per_token": {"mean": 1.5, "se": 0.1}, "grader": "exact"},
]


def _config(out: Path, **train: Any) -> Config:
    out.mkdir(exist_ok=True)
    return config_from_tree({"train": {"out": str(out), **train}}, "here")


def _rows(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


# --- trackers


class _Page:
    """What W&B's run does, noted."""

    def __init__(self, **given: Any) -> None:
        self.given, self.logged, self.steps, self.finished = given, [], [], False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.steps.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.logged.append(row)
        if len(self.logged) > 1:
            raise RuntimeError("the service has gone\nand more")

    def finish(self) -> None:
        self.finished = True


def _stand_in(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    module = types.ModuleType("wandb")
    module.__spec__ = sys.__spec__
    module.init, module.Settings = init, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_a_tracker_that_fails_stops_nothing_and_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[_Page] = []
    _stand_in(monkeypatch, lambda **given: pages.append(_Page(**given)) or pages[-1])
    config, told = _config(tmp_path / "run", wandb="online", wandb_project="p", tensorboard=True), []
    for begin in (-1, 1):
        log = Trackers(config.train, {"a": 1}, begin, told.append)
        for row in (*ROWS, *ROWS[1:]):
            log.write(row)
        log.flush()
        log.close()
    assert told == ["W&B: metrics may be missing from here on (the service has gone); training goes on"] * 2
    first, second = pages
    assert first.logged[0] == pytest.approx(
        {"step": 1, "train/loss": 2.0, "train/grad_norm": float("nan")}, nan_ok=True
    )
    assert first.logged[1] == {"step": 2, "eval/nelbo_per_token/mean": 1.5, "eval/nelbo_per_token/se": 0.1}
    assert first.steps[-1] == ("*", "step") and first.finished
    wanted = {"project": "p", "name": "run", "mode": "online", "config": {"a": 1}, "resume": "allow"}
    assert wanted.items() <= first.given.items()
    assert first.given["id"] == second.given["id"]  # a resumed run goes on with its page
    # The JSON lines have all of it, and a resume has taken out what comes again.
    assert [row["step"] for row in _rows(tmp_path / "run", "eval")] == [2, 2]
    assert [row["grad_norm"] for row in _rows(tmp_path / "run", "train")] == ["nan"] * 2
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_disk_that_is_full_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    log = Trackers(_config(tmp_path / "run").train, {}, -1, told.append)

    def full(line: str) -> None:
        raise UserError("the disk is full")

    append = log._lines._lines.append
    for then in (full, full, append, full):
        monkeypatch.setattr(log._lines._lines, "append", then)
        log.write(ROWS[0])
    assert told == ["the disk is full; training goes on, and the rows wait"] * 2  # once each time


def test_what_a_tracker_needs_is_said_before_the_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.sys, "executable", "/my env/python")
    have: set[str] = {"pip"}
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: sys.__spec__ if name in have else None)
    with pytest.raises(UserError, match="train.wandb needs wandb: '/my env/python' -m pip install wandb$"):
        trackers.check_trackers(_config(tmp_path, wandb="offline").train)
    have.clear()  # as in an environment that uv made
    advice = "train.tensorboard needs tensorboardX: uv pip install --python '/my env/python' tensorboardX$"
    with pytest.raises(UserError, match=advice):
        trackers.check_trackers(_config(tmp_path, tensorboard=True).train)
    trackers.check_trackers(_config(tmp_path).train)

    def refuse(**given: Any) -> None:
        raise RuntimeError("api_key not configured")

    _stand_in(monkeypatch, refuse)
    said = r"did not begin \(api_key not configured\); run `wandb login` or set WANDB_API_KEY .*, or set train.wandb to offline$"
    with pytest.raises(UserError, match=said):
        Trackers(_config(tmp_path / "run", wandb="online").train, {}, -1, print)


def test_trackers_that_need_a_local_folder_are_refused_in_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: sys.__spec__)
    for name, train in {
        "train.tensorboard": {"tensorboard": True},
        "train.wandb offline": {"wandb": "offline"},
    }.items():
        config = config_from_tree({"train": {"out": "gs://bucket/run", **train}}, "here")
        with pytest.raises(UserError, match=f"^{name} writes to a local folder, and train.out is gs://bucket/run"):
            trackers.check_trackers(config.train)
    trackers.check_trackers(config_from_tree({"train": {"out": "gs://bucket/run", "wandb": "online"}}, "here").train)


def test_wandb_offline_writes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    told: list[str] = []
    log = Trackers(_config(tmp_path / "run", wandb="offline").train, {"a": 1}, -1, told.append)
    for row in ROWS:
        log.write(row)
    log.close()
    wandb.teardown()  # finish() returns some milliseconds before the file is whole
    assert told == []
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"nelbo_per_token" in written.read_bytes()


# --- where the time goes


class _Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(goodput.time, "perf_counter", lambda: self.now)

    def compile(self, clock: Goodput, seconds: float, inside: float) -> None:
        """A function is compiled, in it another."""
        self.now += seconds
        clock._note("/jax/core/compile/jaxpr_trace_duration", inside)
        clock._note("/jax/core/compile/backend_compile_duration", seconds)
        clock._note("/jax/something/else", seconds)


def test_time_is_split_without_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    time = _Clock(monkeypatch)
    with Goodput() as clock:
        time.now += 3
        time.compile(clock, 5.0, inside=2.0)
        clock.started()
        with clock.during("evaluation"):
            time.now += 1
            time.compile(clock, 4.0, inside=0.5)
        for cause in ("data", "step"):
            clock.charge("step")
            time.now += 2
            clock.charge(cause)
            time.now += 10
        assert clock.training() == 24
        clock.note_step(6.0)
        clock.note_step(7.0)
        clock.note_step(50.0)
        with clock.during("save"):
            time.now += 1
        clock.add_earlier(EarlierTime({"step": 100.0, "lost": 3.0}, lost_seconds=5.0, lost_steps=2))
        row = clock.row(9)
    assert row["seconds"] == {
        "start": 3, "compile": 9, "step": 122, "data": 2, "evaluation": 1, "save": 1, "lost": 3 + 5 + 2 * 7,
    }  # fmt: skip
    assert row["step_seconds"] == 7.0 and row["goodput"] == pytest.approx(122 / 160)
    assert goodput.describe(row) == (
        "goodput 76%: step 122 s, lost 22 s, compile 9.0 s, start 3.0 s, data 2.0 s, evaluation 1.0 s, save 1.0 s"
    )


def test_what_a_killed_process_did_in_vain(tmp_path: Path) -> None:
    def told(at: int, pace: float | None = None, **seconds: float) -> dict[str, Any]:
        return {"step": at, "kind": "goodput", "seconds": seconds, "step_seconds": pace}

    rows = [
        told(0, start=4.0, evaluation=1.0),
        *({"step": step, "kind": "train"} for step in range(1, 11)),
        told(10, 2.0, start=4.0, evaluation=1.0, step=20.0),
        *({"step": step, "kind": "train"} for step in range(11, 26)),
        told(25, 2.5, start=4.0, evaluation=3.0, step=50.0, save=1.0),
        *({"step": step, "kind": "train"} for step in range(26, 30)),
    ]
    path = tmp_path / "metrics.jsonl"
    assert read_earlier_time(path, -1) == EarlierTime({})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 30, "ki')
    at_ten = read_earlier_time(path, 10)
    assert at_ten.seconds == {**dict.fromkeys(CAUSES, 0.0), "start": 4.0, "evaluation": 1.0, "step": 20.0}
    assert at_ten[1:] == (58.0 - 25.0, 4, 2.5)  # known up to step 25, then four steps
    assert read_earlier_time(path, 29)[1:] == (0.0, 0, 2.5)
    assert read_earlier_time(path, -1) == EarlierTime({}, 58.0, 4, 2.5)  # nothing was saved: everything was in vain


def test_compiling_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    with Goodput() as clock:
        clock.started()
        jax.jit(lambda x: jnp.sin(x) * 17.25 + jax.jit(jnp.cos)(x))(1.0)
        assert clock.row(0)["seconds"]["compile"] > 0
    before = clock._seconds["compile"]
    jax.jit(lambda x: jnp.sin(x) * 18.25)(1.0)
    assert clock._compiles == [] and clock._seconds["compile"] == before  # not after its end


def test_a_run_says_where_its_time_went_and_leaves_a_trace(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = [
        "train",
        "--config",
        str(tiny_config),
        "--train.out",
        str(run),
        "--train.steps",
        "12",
        "--profile",
        "3",
        "4",
    ]
    command += ["--train.eval_problems", "0", "--train.eval_every", "5", "--train.save_every", "8"]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "goodput" in said and "step " in said and f"the trace is in {run / 'profile'}" in said
    assert list((run / "profile").rglob("*.xplane.pb"))
    told = _rows(run, "goodput")
    assert [row["step"] for row in told] == [0, 5, 8, 10, 12, 12]
    assert all(set(row["seconds"]) == set(CAUSES) for row in told)
    for cause in ("start", "step", "evaluation"):
        values = [row["seconds"][cause] for row in told]
        assert values == sorted(values) and values[-1] > 0
    # Readers look at what they know.
    assert len(metrics.read_metrics(run / "metrics.jsonl").train) == 12
    assert all("mfu" not in row for row in _rows(run, "train"))  # a host's peak means nothing


def test_a_window_is_two_steps_of_the_run(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for window in (["0", "3"], ["5", "4"], ["5", "121"]):
        assert main(["train", "--config", str(tiny_config), "--profile", *window]) == 2
        assert f"train.profile is {' '.join(window)}: give the first and the last step" in capsys.readouterr().err


# --- arithmetic


def test_arithmetic_against_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = Architecture(
        "llada", vocab_size=13, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, mlp_dim=24, norm_eps=1e-5,
        rope_theta=100.0, max_len=64, mask_id=11, eos_id=10, pad_id=10, tie_embeddings=False,
    )  # fmt: skip
    table = registry.param_table(arch)
    work = Work(rows=2, positions=20, predicted=8)
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

"""Tests runs that train adapters: from a Hugging Face folder or a run, resumed, scored, exported merged and alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxblock
from jaxblock.cli import main
from jaxblock.errors import UserError
from jaxblock.models.spec import flatten
from jaxblock.training.base_identity import identify_base
from jaxblock.training.checkpoints.reader import CheckpointReader

LORA = ["--lora.rank", "2", "--lora.alpha", "8", "--lora.dropout", "0.2", "--optimizer.ema", "0.5"]
LORA += ["--train.steps", "6", "--train.save_every", "3"]
QUIET = ["--train.eval_problems", "0", "--train.eval_nelbo_rows", "8", "--train.eval_every", "0"]


@pytest.fixture(scope="module")
def base(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports the tiny run, and adds files that a published checkpoint has besides."""
    out = tmp_path_factory.mktemp("lora") / "base"
    assert main(["export", "--checkpoint", str(tiny_run), "--out", str(out)]) == 0
    # What a published checkpoint brings along besides.
    (out / "modeling_llada.py").write_text("raise SystemExit('never run')")
    (out / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    return out


def train(tiny_config: Path, base: Path, out: Path, *more: str) -> int:
    where = ["--model.init_from", str(base), "--train.out", str(out)]
    return main(["train", "--config", str(tiny_config), *where, *LORA, *QUIET, *more])


@pytest.fixture(scope="module")
def run(tiny_config: Path, base: Path) -> Path:
    out = base.parent / "run"
    assert train(tiny_config, base, out) == 0
    return out


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    return [
        row for line in (run / "metrics.jsonl").read_text().splitlines() if (row := json.loads(line))["kind"] == kind
    ]


def test_adapters_alone_are_trained_and_saved(run: Path, base: Path, tiny_run: Path) -> None:
    model, start = jaxblock.load(run), jaxblock.load(base)
    adapters = flatten(model.params["lora"])
    assert len(adapters) == 14 and all(leaf.dtype == np.float32 for leaf in adapters.values())
    assert all(np.abs(leaf).max() > 0 for leaf in adapters.values())  # every matrix's b has moved
    frozen = {name: leaf for name, leaf in model.params.items() if name != "lora"}
    for path, leaf in flatten(start.params).items():
        np.testing.assert_array_equal(flatten(frozen)[path], leaf, err_msg=path)
    sizes = [sum(f.stat().st_size for f in (r / "checkpoints").rglob("*") if f.is_file()) for r in (run, tiny_run)]
    assert sizes[0] < sizes[1]
    first, last = metrics(run, "eval")[0], metrics(tiny_run, "eval")[-1]
    assert first["nelbo_per_token"]["mean"] == pytest.approx(last["nelbo_per_token"]["mean"], rel=1e-4)


def test_what_is_loaded_is_the_moving_average(run: Path) -> None:
    model, checkpoints = jaxblock.load(run), CheckpointReader(run)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), model.params["lora"])
    for average, same in ((True, True), (False, False)):
        stored = checkpoints.restore_params(6, like, average=average)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, stored, model.params["lora"]))) == same
    checkpoints.close()
    bound, _ = model.nelbo([[5, 6, 7]], [[8, model.stop_ids[0]]])
    assert np.isfinite(bound).all()


def test_a_resumed_run_is_the_straight_one_and_its_base_may_move(
    run: Path, base: Path, tiny_config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "6")
    moved = shutil.copytree(base, tmp_path / "moved")
    assert train(tiny_config, moved, out, "--train.fsdp", "4") == 0
    want, got = (flatten(jaxblock.load(r, base=base).params["lora"]) for r in (run, out))
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, rtol=0, atol=2e-6, err_msg=path)


def test_another_base_is_refused(run: Path, base: Path, tiny_config: Path, tmp_path: Path, capsys: Any) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="not the base that these adapters were trained on"):
        jaxblock.load(run, base=other)
    out = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "6")
    assert train(tiny_config, other, out) == 2
    assert "set model.init_from to that one" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not there: set model.init_from"):
        jaxblock.load(run, base=tmp_path / "nowhere")


def test_a_base_is_known_by_its_end_too(tmp_path: Path, tiny_run: Path) -> None:
    """Only the start and the end of a large file are read; of a run, the step is part of the identity."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(300_000))
    before = identify_base(str(tmp_path)).fingerprint
    file.write_bytes(bytes(299_999) + b"x")
    assert identify_base(str(tmp_path)).fingerprint != before
    file.write_bytes(bytes(300_001))
    assert identify_base(str(tmp_path)).fingerprint != before
    run = shutil.copytree(tiny_run, tmp_path / "run")
    last = identify_base(str(run))
    shutil.rmtree(run / "checkpoints" / str(last.step))
    assert identify_base(str(run)).fingerprint != last.fingerprint


def test_exports_give_the_same_network(run: Path, base: Path, tmp_path: Path) -> None:
    """Exports adapters merged into one checkpoint, and alone in PEFT's format for the same base."""
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "merged")]) == 0
    alone = ["--format", "adapter", "--out", str(tmp_path / "adapter")]
    assert main(["export", "--checkpoint", str(run), *alone]) == 0
    assert (tmp_path / "merged" / "modeling_llada.py").read_text() == (base / "modeling_llada.py").read_text()
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["temperature"] == 0.5
    assert not (tmp_path / "adapter" / "modeling_llada.py").exists()
    model = jaxblock.load(run)
    ids = np.random.default_rng(0).integers(0, model.arch.vocab_size, (2, 9))
    want = model.logits(ids)
    np.testing.assert_allclose(jaxblock.load(tmp_path / "merged").logits(ids), want, atol=2e-5)
    again = jaxblock.load(tmp_path / "adapter", base=base)
    np.testing.assert_array_equal(again.logits(ids), want)
    assert again.stop_ids == jaxblock.load(base).stop_ids and again.encoder is not None
    prompt = again.encoder.prompt("3+4?")
    np.testing.assert_array_equal(
        again.decode([prompt], response_len=16, block=4), model.decode([prompt], response_len=16, block=4)
    )


def test_int8_trains_and_exports_the_whole_base(base: Path, tiny_config: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    assert train(tiny_config, base, out, "--model.quantize", "int8") == 0
    losses = [row["loss"] for row in metrics(out, "train")]
    assert len(losses) == 6 and np.isfinite(losses).all()
    model = jaxblock.load(out)
    assert model.net.quantize == "int8" and flatten(model.params)["blocks/q"].dtype == np.int8
    with pytest.raises(UserError, match="load it with quantize none"):
        model.save(tmp_path / "never")
    assert main(["export", "--checkpoint", str(out), "--out", str(tmp_path / "merged")]) == 0
    whole, start = (flatten(jaxblock.load(f).params) for f in (tmp_path / "merged", base))
    assert whole["embed"].dtype == start["embed"].dtype
    np.testing.assert_array_equal(whole["embed"], start["embed"])
    pair = model.params["lora"]["blocks"]["q"]
    want = np.asarray(start["blocks/q"]) + np.asarray(pair["a"]) @ np.asarray(pair["b"]) * (8 / 2)
    assert np.abs(want - np.asarray(start["blocks/q"])).max() > 1e-3
    np.testing.assert_allclose(whole["blocks/q"], want, atol=1e-6)  # int8's rounding is nowhere in it


def test_adapters_on_a_run_and_a_start_from_adapters(
    run: Path, tiny_run: Path, tiny_config: Path, tmp_path: Path, capsys: Any
) -> None:
    assert train(tiny_config, tiny_run, tmp_path / "on_run") == 0
    on_run, on_export = (flatten(jaxblock.load(r).params["lora"]) for r in (tmp_path / "on_run", run))
    for path, leaf in on_export.items():
        np.testing.assert_allclose(on_run[path], leaf, rtol=0, atol=1e-6, err_msg=path)
    rounded = jaxblock.load(tmp_path / "on_run", quantize="int8")
    whole = jaxblock.load(tmp_path / "on_run", quantize="none")
    got, want = (np.asarray(model.logits([[5, 6, 7, 8]])) for model in (rounded, whole))
    assert rounded.net.quantize == "int8" and 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()
    assert train(tiny_config, run, tmp_path / "twice") == 2
    assert "adapters on adapters" in capsys.readouterr().err
    start = ["--model.init_from", str(run), "--train.out", str(tmp_path / "full"), "--train.steps", "2"]
    assert main(["train", "--config", str(tiny_config), *start, *QUIET]) == 0
    begun, ended = metrics(tmp_path / "full", "eval")[0], metrics(run, "eval")[-1]
    assert begun["nelbo_per_token"]["mean"] == pytest.approx(ended["nelbo_per_token"]["mean"], rel=1e-4)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--lora.targets", "qkv"], "lora.targets: 'qkv' matches no matrix"),
        (["--lora.rank", "0", "--model.quantize", "int8"], "int8 weights cannot be trained"),
        (["--lora.dropout", "1.0"], "lora.dropout is 1.0"),
        (["--model.init_from", "None"], "adapters need trained weights"),
    ],
)
def test_settings_that_make_no_sense(
    tiny_config: Path, base: Path, tmp_path: Path, capsys: Any, flags: list[str], said: str
) -> None:
    assert train(tiny_config, base, tmp_path / "run", *flags) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_devices(run: Path) -> None:
    """Asserts that the fixture trained on all eight devices, so that nothing above was on one device only."""
    assert jax.device_count() == 8 and (run / "base.json").exists()

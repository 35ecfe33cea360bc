"""A run may start from another run or from a Hugging Face folder: the same weights either way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxblock
from jaxblock.cli import main
from jaxblock.config.yaml import config_from_tree, load_config
from jaxblock.fit import compile as fit_compile
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.training import weights
from jaxblock.training.observe import device_memory, metrics


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert main(["export", "--checkpoint", str(tiny_run), "--out", str(folder)]) == 0
    return folder


def test_a_run_and_its_export_give_the_same_start(
    tiny_config: Path, tiny_run: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {}
    for source in (tiny_run, exported):
        out = tiny_config.parent / f"from-{source.name}"
        # The sizes of a random start have no effect: the checkpoint's own count. The config has others, which agree.
        flags = ["--train.out", str(out), "--model.init_from", str(source), "--model.d_model", "20"]
        flags += ["--evaluate.problems", "5"]
        flags += ["--train.eval_every", "0", "--train.log_every", "40"]
        assert main(["train", "--config", str(tiny_config), *flags]) == 0
        said = capsys.readouterr().err
        assert (
            "model.d_model is 20 (the checkpoint's is 16): the sizes" in said and said.count("(the checkpoint's") == 1
        )
        assert said.count("--evaluate.problems does not change how training evaluates") == 1
        first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        last = metrics.read_metrics(tiny_run / "metrics.jsonl").evals[-1]
        assert first["step"] == 0 and last["step"] == 120
        assert first["nelbo_per_token"] == pytest.approx(last["nelbo_per_token"], rel=1e-5)
        ends[source] = jax.tree.leaves(jaxblock.load(out).params)
    for left, right in zip(*ends.values(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_an_older_checkpoint_is_exported_and_started_from(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [[5, 6, 7, 8]]
    older, newest = (jaxblock.load(tiny_run, step=step).logits(ids) for step in (100, 120))
    assert np.abs(older - newest).max() > 0
    flags = ["--checkpoint", str(tiny_run), "--out", str(tmp_path / "export")]
    assert main(["export", *flags, "--step", "110"]) == 2
    assert "no whole checkpoint of step 110; there are 100, 120" in capsys.readouterr().err
    assert main(["export", *flags, "--step", "100"]) == 0
    np.testing.assert_array_equal(jaxblock.load(tmp_path / "export").logits(ids), older)

    out = ["--train.out", str(tmp_path / "out"), "--train.steps", "2", "--train.eval_problems", "0"]
    start = ["train", "--config", str(tiny_config), *out, "--train.eval_nelbo_rows", "0", "--optimizer.lr", "1e-30"]
    assert main([*start, "--model.init_step", "100"]) == 2
    assert "model.init_from, the run whose checkpoint it is, is not set" in capsys.readouterr().err
    assert main([*start, "--model.init_step", "100", "--model.init_from", str(tmp_path / "export")]) == 2
    assert "model.init_step is 100, but" in capsys.readouterr().err
    assert main([*start, "--model.init_step", "100", "--model.init_from", str(tiny_run)]) == 0
    assert "starting from step 100 of" in capsys.readouterr().err
    np.testing.assert_allclose(jaxblock.load(tmp_path / "out").logits(ids), older, atol=1e-6)
    config = load_config(str(tmp_path / "out" / "config.yaml"))  # a number in YAML, and a word
    assert config.model.init_step == 100 and config_from_tree({"model": {"init_step": "best"}}, "here").model


def test_a_checkpoint_with_other_ids_is_refused(
    tiny_config: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str, **changed: int) -> str:
        folder = tmp_path / name
        shutil.copytree(exported, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))
        out = tmp_path / "out"
        assert (
            main(["train", "--config", str(tiny_config), "--model.init_from", str(folder), "--train.out", str(out)])
            == 2
        )
        assert not out.exists()
        return capsys.readouterr().err

    assert "calls 7 its mask token" in refused("mask", mask_token_id=7)
    assert "calls 5 its end-of-sequence token" in refused("eos", eos_token_id=5)
    assert "wte" in refused("tensors", d_model=32)


def test_a_smaller_vocabulary_is_refused(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config.parent
    flags = ["--data.prepared", str(tmp_path / "more"), "--data.train", str(tmp_path / "more.jsonl")]
    text = (config / "train.jsonl").read_text()
    (tmp_path / "more.jsonl").write_text(text + '{"question": "xyz?", "answer": "klmvw"}\n')
    assert main(["prepare", "--config", str(tiny_config), *flags]) == 0
    command = ["--config", str(tiny_config), *flags]
    assert main(["train", *command, "--model.init_from", str(tiny_run), "--train.out", str(tmp_path / "out")]) == 2
    assert "embedding rows, but the data's tokenizer has ids up to" in capsys.readouterr().err
    # Scoring it on such data would be nonsense too.
    assert main(["evaluate", *command, "--checkpoint", str(tiny_run), "--out", str(tmp_path / "scores")]) == 2
    assert "embedding rows" in capsys.readouterr().err


@pytest.fixture(scope="module")
def poisoned(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Path]:
    """Makes a Hugging Face folder of the run with one weight of layer 1 replaced."""

    def make(name: str, value: float) -> Path:
        model = jaxblock.load(tiny_run)
        blocks = dict(model.params["blocks"])
        blocks[name] = blocks[name].at[1].set(blocks[name][1].at[(0,) * (blocks[name].ndim - 1)].set(value))
        folder = tmp_path_factory.mktemp("poisoned") / "hf"
        save_checkpoint(folder, model.arch, {**model.params, "blocks": blocks})
        return folder

    return make


def test_debug_finds_the_layer_of_a_bad_weight(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], poisoned: Callable[[str, float], Path]
) -> None:
    command = [
        "train",
        "--config",
        str(tiny_config),
        "--train.out",
        str(tmp_path / "out"),
        "--train.eval_problems",
        "0",
    ]
    command += ["--train.eval_nelbo_rows", "0"]
    source = poisoned("up", float("nan"))
    assert main([*command, "--model.init_from", str(source), "--train.debug"]) == 2
    assert "before the first step: blocks/up (layer 1)" in capsys.readouterr().err


@pytest.mark.slow
def test_debug_finds_the_layer_and_the_step_of_a_nan(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], poisoned: Callable[[str, float], Path]
) -> None:
    """Every weight is finite, but layer 1's products are not."""
    command = [
        "train",
        "--config",
        str(tiny_config),
        "--train.out",
        str(tmp_path / "out"),
        "--train.eval_problems",
        "0",
    ]
    command += ["--train.eval_nelbo_rows", "0"]
    source = poisoned("attn_norm", 3e38)
    assert main([*command, "--model.init_from", str(source), "--train.debug"]) == 2
    assert "step 1: layer 1 is the first whose output is not finite" in capsys.readouterr().err


def test_without_debug_nans_stop_the_run_and_nothing_is_saved(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], poisoned: Callable[[str, float], Path]
) -> None:
    """Every step is skipped, and the state holds an infinity from the start: it must not be written at step 2."""
    flags = ["--train.out", str(tmp_path / "run"), "--train.save_every", "2", "--train.log_every", "4"]
    flags += ["--train.eval_problems", "0", "--train.eval_nelbo_rows", "0", "--train.max_skipped", "3"]
    source = poisoned("down", float("inf"))
    assert main(["train", "--config", str(tiny_config), *flags, "--model.init_from", str(source)]) == 2
    error = capsys.readouterr().err
    assert "3 steps in a row" in error and "step 1: the loss is nan" in error and "--train.debug" in error
    assert "train records" in error and "the state holds NaN or infinity" in error
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not checkpoints.exists() or list(checkpoints.iterdir()) == []


def test_a_run_that_does_not_fit_is_refused_before_weights_are_read(
    tiny_config: Path,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The refusal must come first, because reading the weights of a large network takes minutes."""
    read = []
    monkeypatch.setattr(weights, "starting_weights", lambda *_: read.append(1))
    monkeypatch.setattr(device_memory, "device_limit", lambda device: 1000.0)
    monkeypatch.setattr(fit_compile, "TRIES", 0)
    flags = ["--train.out", str(tmp_path / "out"), "--model.init_from", str(tiny_run)]
    assert main(["train", "--config", str(tiny_config), *flags]) == 2
    assert "the train step needs" in capsys.readouterr().err and not read and not (tmp_path / "out").exists()

"""A run may start from another run or from a Hugging Face folder: the same weights either way."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

import jaxblock
from jaxblock.cli import main
from jaxblock.config.yaml import config_from_tree, load_config
from jaxblock.errors import UserError
from jaxblock.fit import compile as fit_compile
from jaxblock.huggingface import tensor_files
from jaxblock.training import weights
from jaxblock.training.observe import device_memory
from tests import runs


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert main(["export", "--checkpoint", str(tiny_run), "--out", str(folder)]) == 0
    return folder


def test_a_run_and_its_export_give_the_same_start(
    tiny_config: Path, tiny_run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The sizes of a random start have no effect: the checkpoint's own count. The config has others, which agree.
    flags = [*runs.QUIET, "--train.steps", "2", "--train.eval_nelbo_rows", "8", "--model.d_model", "20"]
    flags += ["--evaluate.problems", "5", "--train.out", str(tmp_path / "first"), "--model.init_from"]
    assert main(["train", "--config", str(tiny_config), *flags, str(exported)]) == 0
    said = capsys.readouterr().err
    assert "model.d_model is 20 (the checkpoint's is 16): the sizes" in said and said.count("(the checkpoint's") == 1
    assert said.count("--evaluate.problems does not change how training evaluates") == 1
    first, last = runs.rows(tmp_path / "first", "eval")[0], runs.rows(tiny_run, "eval")[-1]
    assert first["step"] == 0 and last["step"] == 120
    assert first["nelbo_per_token"] == pytest.approx(last["nelbo_per_token"], rel=1e-5)
    starts = [_start(tiny_config, tmp_path / source.name, source)[0] for source in (tiny_run, exported)]
    chex.assert_trees_all_equal(*starts)


def _start(tiny_config: Path, out: Path, source: Path, step: str = "latest") -> tuple[Any, str]:
    """Returns the parameters of a run before its first step, and what was printed."""
    said = io.StringIO()
    flags = ["--train.out", str(out), "--model.init_from", str(source), "--model.init_step", step]
    return jax.device_get(
        runs.session(runs.config(tiny_config, *flags), Console(file=said, width=500)).state.params
    ), said.getvalue()


def test_an_older_checkpoint_is_exported_and_started_from(
    tiny_config: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newest = (jax.device_get(jaxblock.load(tiny_run, step=step).params) for step in (100, 120))
    assert not np.array_equal(older["embed"], newest["embed"])
    flags = ["--checkpoint", str(tiny_run), "--out", str(tmp_path / "export")]
    assert main(["export", *flags, "--step", "110"]) == 2
    assert "no whole checkpoint of step 110; there are 100, 120" in capsys.readouterr().err
    assert main(["export", *flags, "--step", "100"]) == 0
    chex.assert_trees_all_equal(jax.device_get(jaxblock.load(tmp_path / "export").params), older)

    start = ["train", "--config", str(tiny_config), "--train.out", str(tmp_path / "never"), "--model.init_step", "100"]
    assert main(start) == 2
    assert "model.init_from, the run whose checkpoint it is, is not set" in capsys.readouterr().err
    assert main([*start, "--model.init_from", str(tmp_path / "export")]) == 2
    assert "model.init_step is 100, but" in capsys.readouterr().err
    params, said = _start(tiny_config, tmp_path / "out", tiny_run, "100")
    assert f"starting from step 100 of {tiny_run}" in said
    chex.assert_trees_all_equal(params, older)
    config = load_config(str(tmp_path / "out" / "config.yaml"))  # a number in YAML, and a word
    assert config.model.init_step == 100 and config_from_tree({"model": {"init_step": "best"}}, "here").model


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mask_token_id": 7}, "calls 7 its mask token"),
        ({"eos_token_id": 5}, "calls 5 its end-of-sequence token"),
        ({"d_model": 32}, "wte"),
    ],
)
def test_a_checkpoint_with_other_ids_or_sizes_is_refused(
    tiny_config: Path, exported: Path, tmp_path: Path, changed: dict[str, int], said: str
) -> None:
    folder = shutil.copytree(exported, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UserError, match=said):
        _start(tiny_config, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


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


@pytest.fixture
def poisoned(
    tiny_config: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Returns flags that start from the exported weights with one weight of layer 1 replaced.

    Reading a Hugging Face folder refuses numbers that are not finite. Here it does not, as reading a run's weights does not.
    """
    monkeypatch.setattr(tensor_files, "_all_finite", lambda values: True)

    def flags(name: str, value: float, *more: str) -> list[str]:
        folder = shutil.copytree(exported, tmp_path / "hf")
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        (changed,) = (found for found in tensors if f"blocks.1.{name}." in found)
        tensors[changed][(0,) * tensors[changed].ndim] = value
        save_file(tensors, file)
        flags = ["train", "--config", str(tiny_config), "--train.out", str(tmp_path / "run"), *runs.QUIET, *more]
        return [*flags, "--model.init_from", str(folder)]

    return flags


def test_debug_finds_the_layer_of_a_bad_weight(poisoned: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match=r"before the first step: blocks/up \(layer 1\)"):
        runs.session(runs.config(*poisoned("up_proj", float("nan"), "--train.debug")[2:]))


@pytest.mark.slow
def test_debug_finds_the_layer_and_the_step_of_a_nan(
    poisoned: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every weight is finite, but layer 1's products are not."""
    assert main(poisoned("attn_norm", 3e38, "--train.debug")) == 2
    assert "step 1: layer 1 is the first whose output is not finite" in capsys.readouterr().err


def test_without_debug_nans_stop_the_run_and_nothing_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], poisoned: Callable[..., list[str]]
) -> None:
    """Every step is skipped, and the state holds an infinity from the start: it must not be written at step 2."""
    flags = ["--train.save_every", "2", "--train.log_every", "4", "--train.max_skipped", "3"]
    flags += ["--train.overfit_one_batch"]
    assert main(poisoned("ff_out", float("inf"), *flags)) == 2
    error = capsys.readouterr().err
    assert "3 steps in a row" in error and "step 1: the loss is nan" in error and "--train.debug" in error
    assert "train records" in error and "the state holds NaN or infinity" in error
    named = re.findall(r"train records ([\d, ]+)", " ".join(error.split()))
    assert len(named) >= 3 and len(set(named)) == 1  # each step takes the one batch
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

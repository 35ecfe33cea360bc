"""A run may start from another run or from a Hugging Face folder, and debug mode finds what is bad in it and in a step."""

import io
import re
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from rich.console import Console

import jaxblock
from jaxblock.config.yaml import config_from_tree, load_config
from jaxblock.errors import UserError
from jaxblock.fit import compile as fit_compile
from jaxblock.fit import shapes
from jaxblock.huggingface import tensor_files
from jaxblock.training import weights
from jaxblock.training.observe import device_memory
from tests import runs
from tests.huggingface import breaking


def _start(tiny_config: Path, out: Path, source: Path, step: str = "latest") -> tuple[Any, str]:
    """Returns the parameters of a run before its first step, and what was printed."""
    said = io.StringIO()
    config = runs.config(tiny_config, *f"--train.out {out} --model.init_from {source} --model.init_step {step}".split())
    return jax.device_get(runs.session(config, Console(file=said, width=500)).state.params), said.getvalue()


def test_a_run_and_its_export_give_the_same_start(tiny_config, tiny_run, tiny_export, tmp_path, ran):
    # The sizes of a random start have no effect: the checkpoint's own count. The config has others, which agree.
    flags = f"{' '.join(runs.QUIET)} --train.steps 2 --train.eval_nelbo_rows 8 --model.d_model 20 --evaluate.problems 5"
    out = tmp_path / "first"
    said = ran(f"train --config {tiny_config} {flags} --train.out {out} --model.init_from {tiny_export}").err
    assert "model.d_model is 20 (the checkpoint's is 16): the sizes" in said and said.count("(the checkpoint's") == 1
    assert said.count("--evaluate.problems does not change how training evaluates") == 1
    first, last = runs.rows(out, "eval")[0], runs.rows(tiny_run, "eval")[-1]
    assert first["step"] == 0 and last["step"] == 120
    assert first["nelbo_per_token"] == pytest.approx(last["nelbo_per_token"], rel=1e-5)
    for source in (tiny_run, tiny_export):
        start = _start(tiny_config, tmp_path / source.name, source)[0]
        chex.assert_trees_all_equal(start, jax.device_get(jaxblock.load(tiny_run).params))


def test_an_older_checkpoint_is_exported_and_started_from(tiny_config, tiny_run, tmp_path, ran):
    older, newest = (jax.device_get(jaxblock.load(tiny_run, step=step).params) for step in (100, 120))
    assert not np.array_equal(older["embed"], newest["embed"])
    export = f"export --checkpoint {tiny_run} --out {tmp_path / 'export'} --step"
    assert "no whole checkpoint of step 110; there are 100, 120" in ran(f"{export} 110", 2).err
    ran(f"{export} 100")
    chex.assert_trees_all_equal(jax.device_get(jaxblock.load(tmp_path / "export").params), older)

    start = f"train --config {tiny_config} --train.out {tmp_path / 'never'} --model.init_step 100 --model.init_from"
    assert "model.init_step is 100, but" in ran(f"{start} {tmp_path / 'export'}", 2).err
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
def test_a_checkpoint_with_other_ids_or_sizes_is_refused(tiny_config, tiny_export, tmp_path, changed, said):
    folder = shutil.copytree(tiny_export, tmp_path / "changed")
    breaking.change("config.json", **changed)(folder)
    with pytest.raises(UserError, match=said):
        _start(tiny_config, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_a_smaller_vocabulary_is_refused(tiny_config, tiny_run, tmp_path, ran):
    """Also for scores, which would be nonsense."""
    text = (tiny_config.parent / "train.jsonl").read_text()
    (tmp_path / "more.jsonl").write_text(text + '{"question": "xyz?", "answer": "klmvw"}\n')
    command = f"--config {tiny_config} --data.prepared {tmp_path / 'more'} --data.train {tmp_path / 'more.jsonl'}"
    ran(f"prepare {command}")
    said = ran(f"train {command} --model.init_from {tiny_run} --train.out {tmp_path / 'out'}", 2).err
    assert "embedding rows, but the data's tokenizer has ids up to" in said
    assert "embedding rows" in ran(f"evaluate {command} --checkpoint {tiny_run} --out {tmp_path / 'scores'}", 2).err


ONE_BATCH = "--train.save_every 2 --train.log_every 4 --train.max_skipped 3 --train.overfit_one_batch"
SKIPPED = ["3 steps in a row", "step 1: the loss is nan", "--train.debug", "the state holds NaN or infinity"]


@pytest.mark.parametrize(
    ("name", "value", "flags", "said"),
    [
        ("up_proj", np.nan, "--train.debug", ["before the first step: blocks/up (layer 1)"]),
        # Every weight is finite, but layer 1's products are not.
        pytest.param(
            "attn_norm", 3e38, "--train.debug", ["step 1: layer 1 is the first whose"], marks=pytest.mark.slow
        ),
        # Every step is skipped, and the state holds an infinity from the start: it must not be written at step 2.
        ("ff_out", np.inf, ONE_BATCH, SKIPPED),
    ],
)
def test_a_bad_weight_is_found_and_never_saved(
    tiny_config, tiny_export, tmp_path, monkeypatch, ran, name, value, flags, said
):
    """One weight of layer 1 is replaced.

    Reading a Hugging Face folder refuses numbers that are not finite. Here it does not, as reading a run's weights does not.
    """

    def spoil(held: dict[str, np.ndarray]) -> None:
        (changed,) = (found for found in held if f"blocks.1.{name}." in found)
        held[changed].flat[0] = value

    monkeypatch.setattr(tensor_files, "_all_finite", lambda values: True)
    breaking.change("model.safetensors", spoil)(shutil.copytree(tiny_export, tmp_path / "hf"))
    out = f"--train.out {tmp_path / 'run'} {' '.join(runs.QUIET)} {flags}"
    error = " ".join(ran(f"train --config {tiny_config} {out} --model.init_from {tmp_path / 'hf'}", 2).err.split())
    assert all(text in error for text in said)
    if flags == ONE_BATCH:
        named = re.findall(r"train records ([\d, ]+)", error)
        assert len(named) >= 3 and len(set(named)) == 1  # each step takes the one batch
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not checkpoints.exists() or list(checkpoints.iterdir()) == []


def test_a_run_that_does_not_fit_is_refused_before_weights_are_read(tiny_config, tiny_run, tmp_path, monkeypatch, ran):
    """The refusal must come first, because reading the weights of a large network takes minutes."""
    monkeypatch.setattr(weights, "starting_weights", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(device_memory, "device_limit", lambda device: 1000.0)
    monkeypatch.setattr(fit_compile, "TRIES", 0)
    command = f"train --config {tiny_config} --train.out {tmp_path / 'out'} --model.init_from {tiny_run}"
    assert "the train step needs" in ran(command, 2).err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_debug_mode_compiles_no_step_and_shows_the_batch(tiny_config, tmp_path, ran, monkeypatch):
    command = f"train --config {tiny_config} --train.steps 2 {' '.join(runs.QUIET)} --train.out {tmp_path}"
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "jit_step", lambda *arguments: pytest.fail("a step was compiled"))
        shown = ran(f"{command}/run --train.debug").err
    assert "block 0" in shown and "masked, weight" in shown
    ran(f"{command}/jitted")
    slow, jitted = runs.rows(tmp_path / "run"), runs.rows(tmp_path / "jitted")
    assert [row["step"] for row in slow] == [1, 2]
    np.testing.assert_allclose([row["loss"] for row in jitted], [row["loss"] for row in slow], rtol=1e-5)

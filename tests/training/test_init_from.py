"""A run may start from another run or from a Hugging Face folder, and debug mode finds what is bad in it and in a step."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

import jaxblock
from jaxblock import build
from jaxblock.config.yaml import config_from_tree, load_config
from jaxblock.errors import UserError
from jaxblock.fit import compile as fit_compile
from jaxblock.fit import shapes
from jaxblock.huggingface import tensor_files
from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.spec import init_params
from jaxblock.training import weights
from jaxblock.training.guard.debug import NanFinder, not_finite
from jaxblock.training.observe import device_memory
from tests import runs


def _start(tiny_config: Path, out: Path, source: Path, step: str = "latest") -> tuple[Any, str]:
    """Returns the parameters of a run before its first step, and what was printed."""
    said = io.StringIO()
    config = runs.config(tiny_config, *f"--train.out {out} --model.init_from {source} --model.init_step {step}".split())
    return jax.device_get(runs.session(config, Console(file=said, width=500)).state.params), said.getvalue()


def test_a_run_and_its_export_give_the_same_start(tiny_config, tiny_run, tiny_export, tmp_path, ran):
    # The sizes of a random start have no effect: the checkpoint's own count. The config has others, which agree.
    flags = f"{' '.join(runs.QUIET)} --train.steps 2 --train.eval_nelbo_rows 8 --model.d_model 20 --evaluate.problems 5"
    said = ran(
        f"train --config {tiny_config} {flags} --train.out {tmp_path / 'first'} --model.init_from {tiny_export}"
    ).err
    assert "model.d_model is 20 (the checkpoint's is 16): the sizes" in said and said.count("(the checkpoint's") == 1
    assert said.count("--evaluate.problems does not change how training evaluates") == 1
    first, last = runs.rows(tmp_path / "first", "eval")[0], runs.rows(tiny_run, "eval")[-1]
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

    start = f"train --config {tiny_config} --train.out {tmp_path / 'never'} --model.init_step 100"
    assert "model.init_from, the run whose checkpoint it is, is not set" in ran(start, 2).err
    assert "model.init_step is 100, but" in ran(f"{start} --model.init_from {tmp_path / 'export'}", 2).err
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
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changed))
    with pytest.raises(UserError, match=said):
        _start(tiny_config, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_a_smaller_vocabulary_is_refused(tiny_config, tiny_run, tmp_path, ran):
    text = (tiny_config.parent / "train.jsonl").read_text()
    (tmp_path / "more.jsonl").write_text(text + '{"question": "xyz?", "answer": "klmvw"}\n')
    command = f"--config {tiny_config} --data.prepared {tmp_path / 'more'} --data.train {tmp_path / 'more.jsonl'}"
    ran(f"prepare {command}")
    said = ran(f"train {command} --model.init_from {tiny_run} --train.out {tmp_path / 'out'}", 2).err
    assert "embedding rows, but the data's tokenizer has ids up to" in said
    # Scoring it on such data would be nonsense too.
    assert "embedding rows" in ran(f"evaluate {command} --checkpoint {tiny_run} --out {tmp_path / 'scores'}", 2).err


@pytest.fixture
def poisoned(
    tiny_config: Path, tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Returns a command that starts from the exported weights with one weight of layer 1 replaced.

    Reading a Hugging Face folder refuses numbers that are not finite. Here it does not, as reading a run's weights does not.
    """
    monkeypatch.setattr(tensor_files, "_all_finite", lambda values: True)

    def command(name: str, value: float, flags: str) -> str:
        folder = shutil.copytree(tiny_export, tmp_path / "hf")
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        (changed,) = (found for found in tensors if f"blocks.1.{name}." in found)
        tensors[changed][(0,) * tensors[changed].ndim] = value
        save_file(tensors, file)
        out = f"--train.out {tmp_path / 'run'} {' '.join(runs.QUIET)} {flags}"
        return f"train --config {tiny_config} {out} --model.init_from {folder}"

    return command


def test_debug_finds_the_layer_of_a_bad_weight(poisoned, ran):
    assert (
        "before the first step: blocks/up (layer 1)" in ran(poisoned("up_proj", float("nan"), "--train.debug"), 2).err
    )


@pytest.mark.slow
def test_debug_finds_the_layer_and_the_step_of_a_nan(poisoned, ran):
    """Every weight is finite, but layer 1's products are not."""
    said = ran(poisoned("attn_norm", 3e38, "--train.debug"), 2).err
    assert "step 1: layer 1 is the first whose output is not finite" in said


def test_without_debug_nans_stop_the_run_and_nothing_is_saved(tmp_path, poisoned, ran):
    """Every step is skipped, and the state holds an infinity from the start: it must not be written at step 2."""
    flags = "--train.save_every 2 --train.log_every 4 --train.max_skipped 3 --train.overfit_one_batch"
    error = ran(poisoned("ff_out", float("inf"), flags), 2).err
    assert "3 steps in a row" in error and "step 1: the loss is nan" in error and "--train.debug" in error
    assert "train records" in error and "the state holds NaN or infinity" in error
    named = re.findall(r"train records ([\d, ]+)", " ".join(error.split()))
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


def test_nan_finder_names_the_first_bad_layer_under_grad_and_vmap():
    model = ModelConfig(d_model=8, n_layers=3, n_heads=2, mlp_dim=8)
    arch = registry.architecture_from_config(model, vocab_size=9, mask_id=8, eos_id=1)
    finder = NanFinder()
    net = build.network(arch, model, check_layer=finder.layer)
    params = jax.device_get(jax.jit(lambda: init_params(net.param_table, 0, "float32"))())
    params["blocks"]["gate"] = params["blocks"]["gate"].copy()
    params["blocks"]["gate"][1, 0, 0] = np.nan
    assert not_finite(params) == ["blocks/gate (layer 1)"]

    def loss(params: dict, ids: jax.Array) -> jax.Array:
        return net.all_logits(params, ids, jnp.arange(4)[None].repeat(2, 0), jnp.array([4, 4])).sum()

    jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, np.ones((2, 2, 4), np.int32))
    jax.effects_barrier()
    assert min(finder._layers) == 1


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


@pytest.mark.slow
def test_one_batch_can_be_learnt_by_heart(tiny_config, tmp_path, ran):
    flags = (
        f"--train.overfit_one_batch --train.log_every 20 {' '.join(runs.QUIET)} --method.draws 4 --optimizer.lr 0.01"
    )
    ran(f"train --config {tiny_config} --train.out {tmp_path} {flags} --model.d_model 32 --train.steps 300")
    losses = [row["loss"] for row in runs.rows(tmp_path)]
    assert losses[0] > 1 and losses[-1] < 0.01, losses

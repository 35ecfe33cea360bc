"""Repeats twelve updates on the published script's batches: losses, gradient norms, learning rates, final weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxblock
from jaxblock.diffusion.canvas import Canvas, Layout
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.objective import Losses, losses
from jaxblock.diffusion.sampling import Draw
from jaxblock.models.linear import lora
from jaxblock.models.spec import Table, flatten
from jaxblock.training.optim.config import OptimizerConfig
from jaxblock.training.optim.make import make_optimizer
from jaxblock.training.optim.schedules import learning_rates
from jaxblock.training.state import TrainState
from jaxblock.training.step import Objective, train_step
from jaxblock.types import Params

STEPS, WIDTH = 12, 40
PEFT = "base_model.model."


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[Path, dict[str, Any], dict[str, np.ndarray]]:
    """Returns the folder of the script's results, its runs, and its batches."""
    folder = shared / "golden" / "train"
    with np.load(folder / "batches.npz") as arrays:
        return folder, json.loads((folder / "runs.json").read_text()), dict(arrays)


@pytest.fixture(scope="module")
def model(shared: Path) -> jaxblock.Model:
    return jaxblock.load(shared / "golden" / "forward" / "llada_mha")


def _layout(model: jaxblock.Model, block: int) -> Layout:
    pad = model.arch.pad_id
    return Layout(WIDTH, block, model.arch.alignment, "paper", None, model.arch.mask_id, pad, (pad,))


def _batch(batches: dict[str, np.ndarray], step: int, block: int) -> tuple[Canvas, Draw]:
    """Returns the script's rows (padding visible) and masks as a canvas and one draw a row."""
    names = ("input_ids", "prompt_len", "length", "block_index", "mask_flags")
    ids, prompt_len, end, active, flags = (batches[name][step].astype(np.int32) for name in names)
    rows, text = len(ids), end - prompt_len
    full, index = np.full(rows, WIDTH, np.int32), np.arange(rows, dtype=np.int32)
    canvas = Canvas(ids, prompt_len, full, text, -(-text // block), index)
    at = (prompt_len + active * block)[:, None] + np.arange(block)
    masked = np.take_along_axis(np.pad(flags, ((0, 0), (0, block))), at, axis=1) > 0
    return canvas, Draw(active, masked, np.float32(1.0 / np.maximum(masked.sum(-1), 1)))


class Replay(Objective):
    """Computes the objective on draws that come with the batch."""

    def __call__(self, params: Params, batch: Any, step: jax.Array) -> Losses:
        canvas, draw = batch
        draws = jax.tree.map(lambda x: x[None], draw)
        return losses(self.net, params, self.layout, canvas, draws, self.method, drawn_blocks=draw.block)


def _optimizer_config(run: dict[str, Any]) -> OptimizerConfig:
    names = {"lr": "peak_lr", "warmup_floor": "min_ratio", "final_ratio": "cos_min_ratio", "clip_norm": "clip"}
    names |= {name: name for name in ("warmup_steps", "weight_decay", "eps")}
    fields = {ours: run[theirs] for ours, theirs in names.items()} | dict(zip(("b1", "b2"), run["betas"], strict=True))
    late = run["schedule"] == "log, engine order"
    order = ("log", "after_update") if late else ("linear", "before_update")
    fields |= dict(zip(("warmup", "scheduler_steps"), order, strict=True))
    return OptimizerConfig(schedule="deepspeed_cosine", decay="all", **fields)


def _follow(batches: dict[str, np.ndarray], run: dict[str, Any], model: jaxblock.Model) -> Params:
    """Takes the run's steps, compares what each reports, and returns what the model trained."""
    config = _optimizer_config(run)
    optimizer = make_optimizer(config, run["total_steps"], model.net.trainable)
    params = jax.device_get(model.params)  # else every step would be computed on all eight devices
    frozen = {} if model.net.lora is None else {path: x for path, x in params.items() if path != lora.KEY}
    trained = params if model.net.lora is None else params[lora.KEY]
    how = MethodConfig(law="floored_bernoulli", blocks="pairs", weighting="masked_mean", normalize="sequences")
    replay = Replay(model.net, _layout(model, run["block_size"]), how, 0, run["batch"])
    step_fn = jax.jit(lambda state, batch, frozen: train_step(replay, optimizer, state, batch, frozen))
    state = TrainState(trained, jax.jit(optimizer.init)(trained), jnp.int32(0))
    for step in range(STEPS):
        state, metrics = step_fn(state, _batch(batches, step, run["block_size"]), frozen)
        total, weight = metrics.losses.loss
        np.testing.assert_allclose(total / weight, run["loss"][step], rtol=0, atol=1e-3, err_msg=f"step {step}")
        np.testing.assert_allclose(metrics.grad_norm, run["grad_norm"][step], rtol=1e-3, err_msg=f"step {step}")
    rates = learning_rates(config, run["total_steps"])
    np.testing.assert_allclose(rates[:STEPS], run["lr"], rtol=1e-5, atol=1e-12)
    return state.params


def _assert_stored(params: Params, table: Table, stored: dict[str, np.ndarray], prefix: str = "") -> None:
    """Asserts that ours and the stored tensors have the same names and, to the fixtures' tolerance, the same values."""
    flat = flatten(jax.device_get(params))
    for path, spec in table.items():
        for layer in range(spec.shape[0] if spec.stacked else 1):
            ours = flat[path][layer] if spec.stacked else flat[path]
            name = spec.hf_name.format(layer=layer).removeprefix(prefix)
            np.testing.assert_allclose(
                ours.T if spec.transpose else ours, stored.pop(name), rtol=0, atol=5e-5, err_msg=name
            )
    assert not stored


@pytest.mark.parametrize("name", ["full_wd0.1", "full_engine_order_log_warmup"])
def test_full_parameter_trajectory(golden, model, name):
    folder, scripts, batches = golden
    params = _follow(batches, scripts[name], model)
    _assert_stored(params, model.net.param_table, load_file(folder / f"{name}.final.safetensors"))


def test_lora_trajectory(golden, model, tmp_path):
    """Trains PEFT's initial adapters, and compares the final ones, the merged matrices, and the merged network's logits."""
    folder, scripts, batches = golden
    run = scripts["lora"]
    config = {"peft_type": "LORA", "r": run["r"], "lora_alpha": run["alpha"], "target_modules": run["targets"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    begun = load_file(folder / "lora.init.safetensors")
    save_file({PEFT + name: value for name, value in begun.items()}, tmp_path / "adapter_model.safetensors")
    adapted = jaxblock.load(tmp_path, base=model.origin)
    assert adapted.net.lora is not None
    assert sum(x.size for x in jax.tree.leaves(adapted.params[lora.KEY])) == run["n_trainable"]

    trained = _follow(batches, run, adapted)
    _assert_stored(trained, adapted.net.trainable, load_file(folder / "lora.final.safetensors"), PEFT)
    params = lora.attach(model.params, trained)
    merged = lora.merge(params, adapted.net.lora)
    targets = {path: model.net.param_table[path] for path in adapted.net.lora.targets}
    _assert_stored(merged, targets, load_file(folder / "lora.merged.safetensors"))
    with np.load(folder / "lora.merged_logits.npz") as arrays:
        ids, logits = arrays["noisy_ids"], arrays["logits"]
    for whole in (dataclasses.replace(model, params=merged), dataclasses.replace(adapted, params=params)):
        np.testing.assert_allclose(whole.logits(ids), logits, rtol=1e-4, atol=2e-4)

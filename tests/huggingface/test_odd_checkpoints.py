"""Tests odd checkpoints that users have: half precision, code left on the hub, autoregressive starts, bad fields."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxblock
from jaxblock.errors import UserError
from jaxblock.huggingface.load import load_checkpoint
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import Lora, adapter_table, attach
from tests.models.networks import random_params


@pytest.mark.parametrize(
    ("family", "field", "value", "message"),
    [
        ("llada", "eos_token_id", [], "eos_token_id is an empty list"),
        ("llada", "rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope_scaling is set"),
        ("llada", "clip_qkv", 8.0, "clip_qkv is 8.0"),
        ("llada", "n_kv_heads", 3, "no multiple of 3"),
        ("llada", "d_model", 18, "does not split into 4 heads"),
        ("llama", "head_dim", 7, "even size"),
        ("llama", "rope_theta", "x", "rope_theta is 'x'"),
        ("llama", "rope_parameters", [1], "must be a JSON object"),
    ],
)
def test_config_fields(small: Any, family: str, field: str, value: Any, message: str) -> None:
    config = registry.to_hf(small(family)[0], "float32")
    with pytest.raises(UserError, match=message):
        registry.from_hf({**config, field: value}, "config.json")


def test_half_precision_is_computed_in_float32_and_kept(saved: Any) -> None:
    model = jaxblock.load(saved("llada", jnp.float16))
    assert model.params["embed"].dtype == jnp.float16
    assert np.isfinite(model.logits([[3, 4, 5]])).all()


def test_code_that_is_not_beside_the_weights_is_named(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved(), tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}}
    path.write_text(json.dumps(config))
    save_checkpoint(tmp_path / "out", *load_checkpoint(tmp_path / "hub"))
    named = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert named == {"AutoModel": "GSAI-ML/LLaDA-8B-Instruct--modeling_llada.LLaDAModelLM"}


def adapted(base: Path, **options: Any) -> Any:
    model = jaxblock.load(base, **options)
    lora = Lora(2, 4.0, 0.0, ("blocks/q",))
    adapters = jax.device_put(random_params(adapter_table(registry.param_table(model.arch), lora)))
    net = dataclasses.replace(model.net, lora=lora)
    return dataclasses.replace(model, net=net, params=attach(model.params, adapters), base=str(base))


def test_adapters_of_an_autoregressive_start_decode_as_they_were_trained(saved: Any, tmp_path: Path) -> None:
    model = adapted(saved("llama", mask_id=None), mask_id=39, alignment="same_position")
    model.save_adapter(tmp_path / "adapter")
    again = jaxblock.load(tmp_path / "adapter")
    assert (again.arch.mask_id, again.arch.alignment) == (39, "same_position")


def test_adapters_cannot_carry_rows_that_their_base_lacks(saved: Any, tmp_path: Path) -> None:
    model = adapted(saved("llama", mask_id=None), mask_id=40)
    # As a run's model.json gives it: what was read says the longer vocabulary too.
    grown = registry.from_hf(registry.to_hf(model.arch, "float32"), "model.json")
    model = dataclasses.replace(model, net=dataclasses.replace(model.net, arch=grown))
    with pytest.raises(UserError, match="vocabulary grew from 40 to 64 rows.*export the merged network"):
        model.save_adapter(tmp_path / "adapter")


def test_batches_that_are_none(saved: Any) -> None:
    model = jaxblock.load(saved())
    for call in (
        lambda: model.logits([[1, 2], [3]]),
        lambda: model.logits([[1, 40]]),
        lambda: model.decode([]),
        lambda: model.nelbo([[1]], [[3]], samples=-1),
    ):
        with pytest.raises(UserError):
            call()

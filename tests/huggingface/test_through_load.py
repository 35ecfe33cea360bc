"""Tests adapters, tokenizers, mask tokens and odd checkpoints that users have, through ``jaxblock.load``."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import jaxblock
from jaxblock.errors import UserError
from jaxblock.huggingface import peft
from jaxblock.huggingface.load import load_checkpoint
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import Lora, adapter_table, attach, merge
from tests.huggingface.breaking import fields, tensors
from tests.models.networks import random_params

IDS = np.arange(3, 15).reshape(2, 6)


def words(folder: Path, count: int) -> None:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0")).save(
        str(folder / "tokenizer.json")
    )


def test_a_folder_of_adapters_is_its_base_and_them(small, saved, tmp_path):
    arch, params = small()
    lora = Lora(2, 4.0, 0.0, ("blocks/q", "blocks/down"))
    table = adapter_table(registry.param_table(arch), lora)
    adapters = jax.device_put(random_params(table, std=0.3))
    peft.save_adapter(tmp_path / "adapters", arch, lora, adapters, base=str(tmp_path / "base"))
    shutil.copytree(saved(), tmp_path / "base")
    merged = jax.jit(merge, static_argnums=1)(attach(params, adapters), lora)
    want = dataclasses.replace(jaxblock.load(tmp_path / "base"), params=merged).logits(IDS)
    np.testing.assert_allclose(jaxblock.load(tmp_path / "adapters").logits(IDS), want, atol=1e-5)
    (tmp_path / "base").rename(tmp_path / "moved")
    moved = jaxblock.load(tmp_path / "adapters", base=tmp_path / "moved", quantize="int8")
    rounded = np.abs(moved.logits(IDS) - want).max()
    assert 0 < rounded < 0.15 * np.abs(want).max()
    with pytest.raises(UserError, match="base"):
        jaxblock.load(tmp_path / "adapters")
    with pytest.raises(UserError, match="do not fit their base"):
        jaxblock.load(tmp_path / "adapters", base=saved("llada", d_model=32, head_dim=8))


def test_a_tokenizer_may_be_shorter_than_the_vocabulary_and_no_longer(saved, tmp_path):
    shutil.copytree(saved("llama", mask_id=None), tmp_path / "out")
    words(tmp_path / "out", 30)
    assert jaxblock.load(tmp_path / "out").tokenizer is not None
    words(tmp_path / "out", 41)
    with pytest.raises(UserError, match=r"ids up to 40, but the embedding .* has 40 rows"):
        jaxblock.load(tmp_path / "out")
    model = jaxblock.load(tmp_path / "out", mask_id=40)
    assert (model.arch.vocab_size, model.arch.mask_id) == (64, 40)


def test_an_autoregressive_start_decodes_once_it_has_a_mask(saved, tmp_path):
    plain = jaxblock.load(saved("llama", mask_id=None))
    options = {"response_len": 8, "block": 4, "steps_per_block": 4}
    with pytest.raises(UserError, match="mask_id"):
        plain.decode(IDS, **options)
    model = jaxblock.load(saved("llama", mask_id=None), mask_id=39, alignment="same_position")
    found = model.decode(IDS, **options)
    assert found.shape == (2, 8) and not (np.asarray(found) == 39).any()
    chex.assert_trees_all_equal(jax.device_get(model.params), jax.device_get(plain.params))
    assert model.save(tmp_path / "again") == 0 < model.save(tmp_path / "half", jnp.bfloat16) < 1
    np.testing.assert_array_equal(jaxblock.load(tmp_path / "again").decode(IDS, **options), found)


def test_half_precision_is_computed_in_float32_and_kept(saved):
    model = jaxblock.load(saved("llada", jnp.float16))
    assert model.params["embed"].dtype == jnp.float16
    assert np.isfinite(model.logits([[3, 4, 5]])).all()


def test_mixed_types_are_computed_in_the_widest(saved, tmp_path):
    shutil.copytree(saved("llada"), tmp_path / "mixed")
    name = "model.transformer.ln_f.weight"
    tensors("model.safetensors", lambda t: t.update({name: t[name].astype(jnp.bfloat16)}))(tmp_path / "mixed")
    assert jaxblock.load(tmp_path / "mixed").net.dtype == "float32"


def test_code_that_is_not_beside_the_weights_is_named(saved, tmp_path):
    shutil.copytree(saved(), tmp_path / "hub")
    fields("config.json", auto_map={"AutoModel": "modeling_llada.LLaDAModelLM"})(tmp_path / "hub")
    save_checkpoint(tmp_path / "out", *load_checkpoint(tmp_path / "hub"))
    named = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert named == {"AutoModel": "GSAI-ML/LLaDA-8B-Instruct--modeling_llada.LLaDAModelLM"}


def test_adapters_of_an_autoregressive_start_decode_as_they_were_trained(saved, tmp_path):
    def adapted(**options: Any) -> Any:
        model = jaxblock.load(saved("llama", mask_id=None), **options)
        lora = Lora(2, 4.0, 0.0, ("blocks/q",))
        adapters = jax.device_put(random_params(adapter_table(registry.param_table(model.arch), lora)))
        net, base = dataclasses.replace(model.net, lora=lora), str(saved("llama", mask_id=None))
        return dataclasses.replace(model, net=net, params=attach(model.params, adapters), base=base)

    adapted(mask_id=39, alignment="same_position").save_adapter(tmp_path / "adapter")
    again = jaxblock.load(tmp_path / "adapter")
    assert (again.arch.mask_id, again.arch.alignment) == (39, "same_position")

    model = adapted(mask_id=40)
    # As a run's model.json gives it: what was read says the longer vocabulary too.
    grown = registry.from_hf(registry.to_hf(model.arch, "float32"), "model.json")
    model = dataclasses.replace(model, net=dataclasses.replace(model.net, arch=grown))
    with pytest.raises(UserError, match="vocabulary grew from 40 to 64 rows.*export the merged network"):
        model.save_adapter(tmp_path / "rows")


def test_batches_that_are_none(saved):
    model = jaxblock.load(saved())
    for call in (
        lambda: model.logits([[1, 2], [3]]),
        lambda: model.logits([[1, 40]]),
        lambda: model.decode([]),
        lambda: model.nelbo([[1]], [[3]], samples=-1),
    ):
        with pytest.raises(UserError):
            call()

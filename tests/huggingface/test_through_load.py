"""Tests adapters, tokenizers and mask tokens through ``jaxblock.load``."""

from __future__ import annotations

import dataclasses
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
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import Lora, adapter_table, attach, merge
from tests.models.networks import random_params

IDS = np.arange(3, 15).reshape(2, 6)


def words(folder: Path, count: int) -> None:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0")).save(
        str(folder / "tokenizer.json")
    )


def test_a_folder_of_adapters_is_its_base_and_them(small: Any, saved: Any, tmp_path: Path) -> None:
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


def test_a_tokenizer_may_be_shorter_than_the_vocabulary_and_no_longer(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved("llama", mask_id=None), tmp_path / "out")
    words(tmp_path / "out", 30)
    assert jaxblock.load(tmp_path / "out").tokenizer is not None
    words(tmp_path / "out", 41)
    with pytest.raises(UserError, match=r"ids up to 40, but the embedding .* has 40 rows"):
        jaxblock.load(tmp_path / "out")
    model = jaxblock.load(tmp_path / "out", mask_id=40)
    assert (model.arch.vocab_size, model.arch.mask_id) == (64, 40)


def test_an_autoregressive_start_decodes_once_it_has_a_mask(saved: Any, tmp_path: Path) -> None:
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

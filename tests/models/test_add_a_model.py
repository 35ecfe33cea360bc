"""The worked example of docs/add-a-model.md is run: it is the whole of a family."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import chex
import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

from jaxblock.errors import UserError
from jaxblock.huggingface.load import load_checkpoint
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.architecture import Architecture, RopeScaling
from jaxblock.models.families import registry
from jaxblock.models.families.family import Family
from tests.models.networks import make_arch, random_params

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-model.md"
WORDS = {
    "model.layers": "transformer.h", "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f",
    "self_attn": "attn.attention", "o_proj": "out_proj", "gate_proj": "c_fc_0", "up_proj": "c_fc_1",
    "down_proj": "c_proj", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
    "num_hidden_layers": "num_layers", "rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function",
}  # fmt: skip
"""Llama's words, and those of the page's family."""


def renamed(tree: dict) -> dict:
    return {re.sub("|".join(WORDS), lambda word: WORDS[word[0]], name): value for name, value in tree.items()}


def test_the_worked_example_reads_and_writes_its_layout(tmp_path, monkeypatch):
    """It is a Llama checkpoint under other names."""
    text = PAGE.read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, re.S)
    module = ModuleType("jaxblock.models.families.exaone")
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(registry.FAMILIES, "exaone", module.EXAONE)

    ids = dict(vocab_size=40, mask_id=None, eos_id=1, pad_id=2)
    scaled = dict(rope_theta=1e4, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32))
    llama = make_arch("llama", **ids, **scaled)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(registry.param_table(llama)))
    save_checkpoint(tmp_path / "llama", llama, params)
    save_checkpoint(tmp_path / "exaone", replace(llama, family="exaone", extra=(("embed_dropout", "0.0"),)), params)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("llama", "exaone"))
    chex.assert_trees_all_equal(ours, renamed(theirs))
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("llama", "exaone"))
    named = {"model_type": "exaone", "architectures": ["ExaoneForCausalLM"], "embed_dropout": 0.0}
    assert ours == renamed(theirs) | named and "num_hidden_layers" not in ours
    arch, loaded = load_checkpoint(tmp_path / "exaone")
    assert replace(arch, family="llama", extra=()) == replace(load_checkpoint(tmp_path / "llama")[0], extra=())
    chex.assert_trees_all_equal(loaded, params)
    assert registry.with_mask(arch, 40).vocab_size == 64
    (tmp_path / "exaone" / "config.json").write_text(json.dumps(ours | {"activation_function": "gelu"}))
    with pytest.raises(UserError, match="hidden_act is 'gelu'"):
        load_checkpoint(tmp_path / "exaone")

    # The page names every part of a family, and no field of an architecture that there is not.
    assert all(f"`{part}`" in text for part in Family.__dataclass_fields__)
    fields = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.M)))
    assert fields and set(fields) <= set(Architecture.__dataclass_fields__)

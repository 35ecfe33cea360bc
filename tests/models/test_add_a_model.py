"""The worked example of docs/add-a-model.md is run: it is the whole of a family."""

import json
import re
from pathlib import Path
from types import ModuleType

import chex
import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

from jaxblock.errors import UserError
from jaxblock.huggingface.load import load_checkpoint
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.architecture import Architecture, RopeScaling
from jaxblock.models.families import registry
from jaxblock.models.families.family import Family
from tests.models.networks import make_arch, random_params

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-model.md"


@pytest.fixture
def exaone(monkeypatch):
    """The page's Python, registered as the family that it describes."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    module = ModuleType("jaxblock.models.families.exaone")
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    family: Family = module.EXAONE
    monkeypatch.setitem(registry.FAMILIES, family.name, family)
    return family


def test_the_worked_example_reads_and_writes_its_layout(exaone, tmp_path):
    """A Llama checkpoint under the other names is the same network, and comes out as it came in."""
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    ids = dict(vocab_size=40, mask_id=None, eos_id=1, pad_id=2)
    llama = make_arch("llama", **ids, rope_theta=1e4, alignment="shifted", rope_scaling=scaling)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(registry.param_table(llama)))
    save_checkpoint(tmp_path / "llama", llama, params)

    folder = tmp_path / "exaone"
    folder.mkdir()
    words = {"model.layers": "transformer.h", "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f"}
    words |= {"self_attn": "attn.attention", "o_proj": "out_proj", "gate_proj": "c_fc_0", "up_proj": "c_fc_1"}
    words |= {"down_proj": "c_proj", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}
    words |= {"num_hidden_layers": "num_layers", "rms_norm_eps": "layer_norm_epsilon"}
    words |= {"hidden_act": "activation_function"}

    def renamed(name: str) -> str:
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        return name

    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    save_file({renamed(name): value for name, value in tensors.items()}, folder / "model.safetensors")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    config |= {"model_type": "exaone", "embed_dropout": 0.0}
    (folder / "config.json").write_text(json.dumps({renamed(name): value for name, value in config.items()}))

    arch, loaded = load_checkpoint(folder)
    assert arch.family == "exaone" and (arch.n_layers, arch.norm_eps) == (2, 1e-5)
    assert arch.rope_scaling == llama.rope_scaling
    chex.assert_trees_all_equal(loaded, params)
    save_checkpoint(tmp_path / "again", arch, loaded)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "num_hidden_layers" not in written and (written["num_layers"], written["embed_dropout"]) == (2, 0.0)
    again = load_file(tmp_path / "again" / "model.safetensors")
    chex.assert_trees_all_equal(again, {renamed(name): value for name, value in tensors.items()})
    assert registry.with_mask(arch, 40).vocab_size == 64

    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(UserError, match="hidden_act is 'gelu'"):
        load_checkpoint(folder)


def test_every_family_offers_what_the_page_asks_for(exaone):
    parts = Family.__dataclass_fields__
    assert exaone.name in registry.FAMILIES
    for name, family in registry.FAMILIES.items():
        assert isinstance(family, Family) and family.name == name
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{part}`" in text for part in parts)
    fields = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.M)))
    assert fields and set(fields) <= set(Architecture.__dataclass_fields__)

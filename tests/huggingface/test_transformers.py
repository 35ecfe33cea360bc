"""Tests against transformers and PEFT: their folders give the same float32 logits here, and ours are read by them."""

from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

import jaxblock
from jaxblock.huggingface import peft
from jaxblock.huggingface.load import load_checkpoint
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import Lora, adapter_table, attach, resolve
from jaxblock.models.transformer import Transformer
from jaxblock.types import Params
from tests.huggingface.test_peft import SETTINGS
from tests.models.networks import random_params

torch = pytest.importorskip("torch", reason="benchmarks/requirements.txt is not installed")
transformers = pytest.importorskip("transformers", reason="benchmarks/requirements.txt is not installed")
theirs_peft = pytest.importorskip("peft", reason="benchmarks/requirements.txt is not installed")

SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "rope_theta": 5e4, "initializer_range": 0.2,  # large, so that logits are no noise
}  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 48, (2, 40))  # longer than max_position_embeddings, for the dynamic form

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"eos_token_id": [2, 5]}),
    "wide llama": ("Llama", {"head_dim": 16}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
AT_16 = {"original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **AT_16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **AT_16},
    "yarn with all its numbers": {
        "type": "yarn", "factor": 3.0, "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}  # fmt: skip
# family, tied, shards, stored type, form of rotary positions, adapters: every value of each, and most pairs of them.
GRID = [
    ("llama", False, "1MB", "float32", "default", "plain"),
    ("llama", True, "20KB", "bfloat16", "yarn", "rslora"),
    ("wide llama", False, "20KB", "float16", "llama3", "patterns"),
    ("llama", True, "1MB", "float32", "dynamic", "some layers"),
    ("wide llama", False, "1MB", "float32", "yarn with all its numbers", "none"),
    ("qwen2", True, "1MB", "float16", "linear", "patterns and rslora"),
    ("qwen2", False, "20KB", "float32", "yarn", "one expression"),
    ("qwen2", True, "20KB", "float32", "dynamic", "rslora"),
    ("qwen2", False, "1MB", "bfloat16", "default", "no effect"),
    ("qwen3", False, "20KB", "bfloat16", "dynamic", "plain"),
    ("qwen3", True, "1MB", "float32", "yarn with all its numbers", "patterns"),
    ("qwen3", False, "1MB", "float16", "linear", "some layers"),
    ("qwen3", True, "20KB", "float32", "default", "none"),
]


def make(folder: Path, family: str, tied: bool, shards: str, stored: str, rope: str) -> Any:
    """Writes a checkpoint with transformers, and returns its model in float32."""
    kind, own = FAMILIES[family]
    scaling = ROPES[rope]
    settings = SIZES | own | {"tie_word_embeddings": tied, "rope_scaling": dict(scaling) if scaling else None}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    randomise(model, "norm")
    model.to(getattr(torch, stored)).save_pretrained(folder, max_shard_size=shards)
    return read_by_them(folder)


def randomise(model: Any, pattern: str) -> None:
    """Draws what transformers and PEFT begin as ones or zeros, which would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or pattern in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def read_by_them(folder: Path, dtype: Any = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype).eval()


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def our_logits(net: Transformer, params: Params) -> np.ndarray:
    positions = np.broadcast_to(np.arange(IDS.shape[1], dtype=np.int32), IDS.shape)
    length = np.full(len(IDS), IDS.shape[1], np.int32)
    return np.asarray(jax.jit(net.all_logits)(params, IDS.astype(np.int32), positions, length))


@pytest.mark.parametrize("cell", GRID, ids=lambda cell: "-".join(map(str, cell)))
def test_there_and_back(cell, tmp_path):
    *form, adapters = cell
    folder = base = tmp_path / "base"
    theirs, of_adapters = make(base, *form), None
    assert len(list(base.glob("*.safetensors"))) > 1 or form[2] != "20KB"
    if adapters != "none":
        folder, of_adapters = tmp_path / "adapters", base
        torch.manual_seed(1)
        settings = theirs_peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **SETTINGS[adapters][0])
        theirs = theirs_peft.get_peft_model(theirs, settings)
        randomise(theirs, "lora_B")
        theirs.save_pretrained(folder)
        theirs = theirs_peft.PeftModel.from_pretrained(read_by_them(base), folder)
    model, want = jaxblock.load(folder, base=of_adapters, dtype="float32"), their_logits(theirs)
    got = our_logits(Transformer(model.arch, lora=model.net.lora, mask="causal"), model.params)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
    save_checkpoint(tmp_path / "ours", *load_checkpoint(base), tokenizer=base)
    before, again = read_by_them(base, "auto"), read_by_them(tmp_path / "ours", "auto")
    assert type(again) is type(before)
    held, found = before.state_dict(), again.state_dict()
    assert held.keys() == found.keys() and all(torch.equal(held[key], found[key]) for key in held)
    assert again.generation_config.eos_token_id == FAMILIES[form[0]][1].get("eos_token_id", 2)
    np.testing.assert_array_equal(their_logits(again.float()), their_logits(before.float()))


@pytest.mark.parametrize("family, targets", [("llama", "q o gate down"), ("qwen2", "q k v o gate up down")])
def test_peft_reads_our_adapters_and_we_its_copy(tmp_path, family, targets):
    base = make(tmp_path / "base", family, False, "1MB", "float32", "default")
    plain = their_logits(base)
    arch, params = load_checkpoint(tmp_path / "base")
    lora = Lora(4, 6.0, 0.0, resolve(registry.param_table(arch), targets.split()))
    adapters = jax.device_put(random_params(adapter_table(registry.param_table(arch), lora)))
    want = our_logits(Transformer(arch, lora=lora, mask="causal"), attach(params, adapters))
    peft.save_adapter(tmp_path / "ours", arch, lora, adapters, base=str(tmp_path / "base"))
    loaded = theirs_peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    got = their_logits(loaded)
    assert np.abs(got - want).max() <= 1e-4 and np.abs(got - plain).max() > 0.1
    auto = theirs_peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(their_logits(auto), got)

    loaded.save_pretrained(tmp_path / "theirs")
    again, values = peft.load_adapter(tmp_path / "theirs", arch)
    assert again == lora
    chex.assert_trees_all_equal(values, adapters)

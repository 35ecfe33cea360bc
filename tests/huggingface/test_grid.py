"""Tests that folders of transformers and PEFT give the same float32 logits here, over a grid of forms that such folders have."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxblock
from jaxblock.models.transformer import Transformer

torch = pytest.importorskip("torch", reason="benchmarks/requirements.txt is not installed")
transformers = pytest.importorskip("transformers", reason="benchmarks/requirements.txt is not installed")
peft = pytest.importorskip("peft", reason="benchmarks/requirements.txt is not installed")

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,  # large, so that logits are no noise
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_theta": 5e4,
}
IDS = np.random.default_rng(0).integers(3, 48, (2, 40))  # longer than max_position_embeddings, for the dynamic form

FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    "qwen3": {"head_dim": 16},
}
ROPES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn with all its numbers": {
        "type": "yarn", "factor": 3.0, "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "up_proj": 2},
        "alpha_pattern": {r".*\.[02]\..*\.v_proj": 11, "q_proj": 3},
    },
    "patterns, rslora": {
        "r": 2, "lora_alpha": 3, "target_modules": ["gate_proj", "v_proj"], "use_rslora": True,
        "rank_pattern": {"^model.layers.0.mlp.gate_proj": 5}, "alpha_pattern": {"gate_proj": 9},
    },
    "some layers": {
        "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
    "one expression": {"r": 3, "lora_alpha": 6, "target_modules": r".*\.1\..*(k|gate)_proj", "exclude_modules": ["gate_proj"]},
    "fan in": {
        "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "model.layers.2.mlp.up_proj"], "layers_to_transform": 1,
        "fan_in_fan_out": True,
    },
}  # fmt: skip
# family, tied, shards, stored type, form of rotary positions, adapters: every value of each, and most pairs of them.
GRID = [
    ("llama", False, "1MB", "float32", "default", "plain"),
    ("llama", True, "20KB", "bfloat16", "yarn", "rslora"),
    ("llama", False, "20KB", "float16", "llama3", "patterns"),
    ("llama", True, "1MB", "float32", "dynamic", "some layers"),
    ("llama", False, "1MB", "float32", "yarn with all its numbers", "none"),
    ("qwen2", True, "1MB", "float16", "linear", "patterns, rslora"),
    ("qwen2", False, "20KB", "float32", "yarn", "one expression"),
    ("qwen2", True, "20KB", "float32", "dynamic", "rslora"),
    ("qwen2", False, "1MB", "bfloat16", "default", "fan in"),
    ("qwen3", False, "20KB", "bfloat16", "dynamic", "plain"),
    ("qwen3", True, "1MB", "float32", "yarn with all its numbers", "patterns"),
    ("qwen3", False, "1MB", "float16", "linear", "some layers"),
    ("qwen3", True, "20KB", "float32", "default", "none"),
]


def randomise(model: Any, pattern: str) -> None:
    """Draws what transformers and PEFT begin as ones or zeros, which would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or pattern in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def make(folder: Path, family: str, tied: bool, shards: str, stored: str, rope: str) -> None:
    """Writes a checkpoint with transformers."""
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    scaling = ROPES[rope]
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, **FAMILIES[family], tie_word_embeddings=tied, rope_scaling=dict(scaling) if scaling else None
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    randomise(model, "norm")
    model.to(getattr(torch, stored)).save_pretrained(folder, max_shard_size=shards)


@pytest.mark.parametrize("cell", GRID, ids=lambda cell: "-".join(map(str, cell)))
def test_the_same_logits(cell, tmp_path):
    *form, adapters = cell
    make(tmp_path / "base", *form)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1 or form[2] != "20KB"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", torch_dtype=torch.float32)
    folder = tmp_path / "base"
    settings = ADAPTERS[adapters]
    if settings is not None:
        torch.manual_seed(1)
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
        randomise(theirs, "lora_B")
        folder = tmp_path / "adapters"
        theirs.save_pretrained(folder)
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", torch_dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, folder)
    with torch.no_grad():
        want = theirs.eval()(torch.tensor(IDS)).logits.numpy()
    assert_same(folder, tmp_path / "base" if settings else None, want)
    if "rope_parameters" not in json.loads((tmp_path / "base" / "config.json").read_text()):
        spell_as_transformers_5(tmp_path / "base" / "config.json")
        assert_same(folder, tmp_path / "base" if settings else None, want)


def assert_same(folder: Path, base: Path | None, want: np.ndarray) -> None:
    model = jaxblock.load(folder, base=base, dtype="float32")
    net = Transformer(model.arch, lora=model.net.lora, mask="causal")
    positions = np.broadcast_to(np.arange(IDS.shape[1], dtype=np.int32), IDS.shape)
    length = np.full(len(IDS), IDS.shape[1], np.int32)
    got = np.asarray(jax.jit(net.all_logits)(model.params, IDS.astype(np.int32), positions, length))
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


def spell_as_transformers_5(path: Path) -> None:
    config = json.loads(path.read_text())
    config["rope_parameters"] = {**(config.pop("rope_scaling") or {}), "rope_theta": config.pop("rope_theta")}
    path.write_text(json.dumps(config))

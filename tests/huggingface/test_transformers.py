"""Tests that checkpoints of transformers are read, run and written back, and that it then reads what it had."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="benchmarks/requirements.txt is not installed")
transformers = pytest.importorskip("transformers", reason="benchmarks/requirements.txt is not installed")

from jaxblock.huggingface.load import load_checkpoint  # noqa: E402
from jaxblock.huggingface.save import save_checkpoint  # noqa: E402
from jaxblock.models.families import registry  # noqa: E402
from jaxblock.models.transformer import Transformer  # noqa: E402

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large, so that logits are no noise
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_theta": 5e4}),
    "llama, tied, several ends": ("Llama", {"tie_word_embeddings": True, "eos_token_id": [2, 5]}),
    "llama, llama3 rope": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "llama, linear rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama, wide heads": ("Llama", {"head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def same_rope_in_the_other_spelling(folder: Path) -> None:
    """Rewrites config.json from transformers 4's spelling to transformers 5's, or back."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if "rope_parameters" in config:
        nested = config.pop("rope_parameters")
        config["rope_theta"] = nested.pop("rope_theta")
        config["rope_scaling"] = nested if nested.get("rope_type", "default") != "default" else None
    else:
        scaling = config.pop("rope_scaling") or {"rope_type": "default"}
        config["rope_parameters"] = {**scaling, "rope_theta": config.pop("rope_theta")}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    name, changes = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms are ones and biases zeros otherwise
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    arch, params = load_checkpoint(tmp_path / "theirs")

    ids = np.random.default_rng(0).integers(3, 48, (2, 40))
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    positions = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32), (2, 40))
    length = jnp.full(2, 40, jnp.int32)
    got = Transformer(arch, mask="causal").all_logits(params, jnp.asarray(ids, jnp.int32), positions, length)
    assert np.abs(np.asarray(got) - want).max() <= 2e-5 * np.abs(want).max()

    save_checkpoint(tmp_path / "ours", arch, params, tokenizer=tmp_path / "theirs")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert again.generation_config.eos_token_id == changes.get("eos_token_id", 2)
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(ids)).logits.numpy(), want)

    same_rope_in_the_other_spelling(tmp_path / "theirs")
    other, _ = load_checkpoint(tmp_path / "theirs")
    assert (other.rope_theta, other.rope_scaling) == (arch.rope_theta, arch.rope_scaling)


def test_a_start_with_an_added_mask_token_loads_in_transformers(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    arch = registry.with_mask(load_checkpoint(tmp_path / "theirs")[0], 48)
    _, params = load_checkpoint(tmp_path / "theirs", arch=arch)
    save_checkpoint(tmp_path / "ours", arch, params, tokenizer=tmp_path / "theirs")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert again.config.vocab_size == 64 and again.config.mask_token_id == 48
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits[..., :48], theirs(ids).logits)

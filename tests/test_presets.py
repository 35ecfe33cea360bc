"""The presets at full size: valid, and their train step compiles by shapes alone, with the memory they promise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from jax.sharding import Mesh

from jaxblock import build
from jaxblock.config.checks import check_config
from jaxblock.config.config import Config
from jaxblock.config.yaml import load_config
from jaxblock.fit.shapes import RunShapes, bytes_per_device, lower_step, run_shapes
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.step import Learner

CONFIGS = Path(__file__).parents[1] / "configs"
GB = 1e9

# What the published checkpoints' config.json say.
LLADA_8B: dict[str, Any] = {
    "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
    "embedding_size": 126464, "vocab_size": 126464, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "weight_tying": False,
    "max_sequence_length": 4096, "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081,
}  # fmt: skip
DREAM_7B: dict[str, Any] = {
    "model_type": "Dream", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "max_position_embeddings": 131072, "mask_token_id": 151666,
    "eos_token_id": 151643, "pad_token_id": 151643,
}  # fmt: skip

SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "tie_word_embeddings": True, "max_position_embeddings": 8192, "eos_token_id": 2,
}  # fmt: skip

# preset: (checkpoint, mesh, GB of trained state, GB of frozen base), over all devices.
PRESETS: dict[str, tuple[dict[str, Any], tuple[int, int, int], float, float]] = {
    # 335.5 M adapters in float32 with two moments; 8.02 B weights in bfloat16.
    "llada_8b_paper": (LLADA_8B, (2, 4, 1), 0.3355 * 12, 16.03),
    "llada_8b_lora": (LLADA_8B, (1, 4, 2), 0.1678 * 12, 16.03),
    # bfloat16 weights and two 8-bit moments.
    "llada_8b_full": (LLADA_8B, (1, 8, 1), 8.016 * 4, 0.0),
    "dream_7b_lora": (DREAM_7B, (1, 2, 4), 0.1615 * 12, 15.23),
    # 9.8 M adapters; 134.5 M weights in float32. Four rows a batch, three key/value heads: four devices.
    "smollm2_lora": (SMOLLM2_135M, (1, 4, 1), 0.00977 * 12, 0.538),
    "dream_7b_full": (DREAM_7B, (1, 8, 1), 7.616 * 4, 0.0),
}


def preset(name: str) -> tuple[Config, Architecture]:
    config = check_config(load_config(str(CONFIGS / f"{name}.yaml")))
    arch = registry.from_hf(PRESETS[name][0], name)
    return config, arch if arch.mask_id is not None else registry.with_mask(arch, 0, config.model.alignment)


def whole(tree: Any) -> float:
    """Bytes of a tree over all devices, nothing counted twice."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Built(NamedTuple):
    """A preset's step and its arguments, by shapes alone, on its mesh of 8 devices."""

    config: Config
    learner: Learner
    mesh: Mesh
    shapes: RunShapes


def built(name: str) -> Built:
    config, arch = preset(name)
    shape = PRESETS[name][1]
    learner, mesh = (
        build.learner(config, arch, (arch.eos_id,)),
        make_mesh(*shape, devices=jax.devices()[: math.prod(shape)]),
    )
    return Built(config, learner, mesh, run_shapes(config, learner, mesh))


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_state_is_as_large_as_said_and_split(name: str) -> None:
    found = built(name).shapes
    _, (data, fsdp, tensor), trained, frozen = PRESETS[name]
    assert whole(found.state) / GB == pytest.approx(trained, rel=0.02)
    assert whole(found.frozen) / GB == pytest.approx(frozen, rel=0.01) if frozen else not found.frozen
    # Split over fsdp and tensor, but for norms and the like.
    per_device = bytes_per_device((found.state, found.frozen))
    assert per_device == pytest.approx(whole((found.state, found.frozen)) / (fsdp * tensor), rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_step_compiles_at_full_size(name: str) -> None:
    config, learner, mesh, found = built(name)
    compiled = lower_step(learner, found, mesh).compile()
    memory = compiled.memory_analysis()
    inputs = bytes_per_device((found.state, found.frozen))
    batch = 4 * config.train.batch_size * (config.canvas.prompt_len + config.canvas.response_len + 5)
    assert inputs <= memory.argument_size_in_bytes <= inputs + batch + 4096
    # The state is updated in place.
    assert memory.alias_size_in_bytes >= 0.99 * bytes_per_device(found.state)

"""What each family reads from config.json, and what an autoregressive start becomes with a mask token."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.errors import UserError
from jaxblock.fit.sizes import PUBLISHED
from jaxblock.models.architecture import Architecture, RopeScaling
from jaxblock.models.families import registry
from jaxblock.models.rotary import compute_rotation
from jaxblock.models.spec import count_params

LLAMA: dict[str, Any] = dict(
    model_type="llama", vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=24, rms_norm_eps=1e-5, max_position_embeddings=64, eos_token_id=2,
    rope_theta=5e5, bos_token_id=1,
)  # fmt: skip
WINDOW, TWICE = {"use_sliding_window": True}, {"type": "linear", "factor": 2}
STRETCH = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def read(**changes: Any) -> Architecture:
    return registry.from_hf(LLAMA | changes, "config.json")


def test_an_autoregressive_start_has_no_mask_and_its_vocabulary_grows_only_for_one_beyond_it():
    plain = read()
    assert (plain.mask_id, plain.alignment, plain.head_dim, plain.pad_id) == (None, "shifted", 4, 2)
    # Nothing of ours is in its file.
    assert not {"mask_token_id", "logit_alignment"} & registry.to_hf(plain, "bfloat16").keys()
    for mask, rows in ((0, 100), (99, 100), (100, 128), (127, 128), (128, 192), (163, 192)):
        for alignment in ("shifted", "same_position"):
            arch = registry.with_mask(plain, mask, alignment)
            again = registry.from_hf(registry.to_hf(arch, "bfloat16"), "")
            assert {(a.mask_id, a.vocab_size, a.alignment) for a in (arch, again)} == {(mask, rows, alignment)}
    arch = read(model_type="Dream", mask_token_id=9)  # a diffusion family keeps what it has
    assert registry.with_mask(arch, 9, "shifted") == arch == registry.with_mask(arch, 9)


def test_a_mask_that_cannot_be_is_refused():
    for changes, arguments, message in [
        ({}, (164,), "164 is outside the vocabulary of 100: .*or 100 to add one"),
        ({}, (-1,), "-1 is outside"),
        ({"eos_token_id": [2, 7]}, (7,), "7 is the token that ends a response"),
        ({"mask_token_id": 9}, (8,), "is to be 8, but this llama network was trained with 9"),
        ({"model_type": "Dream", "mask_token_id": 9}, (9, "same_position"), "a dream network's logits are shifted"),
    ]:
        with pytest.raises(UserError, match=message):
            registry.with_mask(read(**changes), *arguments)


def test_both_spellings_of_rotary_positions():
    nested = {"rope_theta": None, "rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}
    new = {"rope_type": "llama3", "rope_theta": 5e5, **STRETCH}
    stretched, linear = RopeScaling("llama3", 8.0, 1.0, 4.0, 32), {"type": "linear", "factor": 2}
    for model_type in ("llama", "qwen2", "qwen3", "Dream"):
        for changes, base, scaling in [
            ({}, 5e5, None),
            (nested, 7e4, None),
            ({"rope_scaling": {"rope_type": "llama3", **STRETCH}}, 5e5, stretched),
            ({"rope_theta": None, "rope_parameters": new}, 5e5, stretched),
            ({"rope_scaling": linear}, 5e5, RopeScaling("linear", 2.0)),
        ]:
            arch = read(model_type=model_type, mask_token_id=9, **changes)
            again = registry.from_hf(registry.to_hf(arch, "float32"), "")
            assert {(a.rope_theta, a.rope_scaling) for a in (arch, again)} == {(base, scaling)}


# What transformers 4.57.6 computes for LLAMA above, with heads of 8 dimensions and a base of 100: each pair's angle per position, and
# the number by which cosines and sines are multiplied (dynamic: in a sequence of 96 tokens).
ROPES: list[tuple[str, dict[str, Any], list[float], float]] = [
    ("linear", {"factor": 4.0}, [0.25, 0.07905694, 0.025, 0.007905695], 1.0),
    ("llama3", STRETCH, [1.0, 0.09583998, 0.0125, 0.003952847], 1.0),
    ("yarn", {"factor": 4.0}, [1.0, 0.2371708, 0.05, 0.007905695], 1.13862944),
    (
        "yarn",
        {"factor": 3.0, "original_max_position_embeddings": 32, "beta_fast": 4.0,
         "beta_slow": 0.5, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False},
        [1.0, 0.2239975, 0.03392391, 0.01054092], 1.05100796,
    ),
    ("yarn", {"factor": 4.0, "attention_factor": 0.9, "beta_fast": 8, "beta_slow": 2}, [1.0, 0.1976424, 0.025, 0.007905695], 0.9),
    ("dynamic", {"factor": 2.0}, [1.0, 0.2509902, 0.06299605, 0.01581139], 1.0),
]  # fmt: skip


@pytest.mark.parametrize("kind, numbers, rates, factor", ROPES)
def test_scaled_rotary_positions_are_those_of_transformers(kind, numbers, rates, factor):
    arch = read(rope_scaling={"rope_type": kind, **numbers}, head_dim=8, rope_theta=100.0)
    assert registry.from_hf(registry.to_hf(replace(arch, extra=()), "float32"), "").rope_scaling == arch.rope_scaling
    cos, sin = compute_rotation(jnp.arange(96)[None], arch, jnp.float32)
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 1, 0], rates, rtol=1e-5)
    np.testing.assert_allclose(np.hypot(sin, cos), factor, rtol=1e-5)


def test_options_that_change_nothing_are_accepted():
    plain = read(model_type="qwen2")
    for changes in (
        WINDOW | {"sliding_window": 8, "max_window_layers": 2},
        WINDOW | {"sliding_window": 64, "max_window_layers": 0},
        WINDOW | {"sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        {"pad_token_id": -1, "attention_bias": False, "mlp_bias": True, "pretraining_tp": 2, "eos_token_id": [2, -1]},
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 5e5}, "partial_rotary_factor": 1.0},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": None},
    ):
        assert replace(read(model_type="qwen2", **changes), extra=()) == replace(plain, extra=())
    arch = read(eos_token_id=[2, 7, 9], pad_token_id=0)
    assert (arch.eos_id, arch.end_ids, arch.pad_id) == (2, (7, 9), 0)
    assert registry.to_hf(arch, "float32")["eos_token_id"] == [2, 7, 9]
    assert read(model_type="qwen3").head_dim == 128  # transformers' default for Qwen3 alone


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this reader supports 'silu' only"),
        (WINDOW | {"sliding_window": 63, "max_window_layers": 1}, "window of 63 .* full attention only"),
        (WINDOW | {"max_position_embeddings": 8192, "max_window_layers": 0}, "window of 4096 positions"),
        (WINDOW | {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, "full attention only"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types asks for 'linear_attention'"),
        ({"layer_types": 5}, "layer_types is 5"),
        ({"rope_parameters": {"rope_theta": 7e4}}, "rope_theta is 70000.0 and 500000.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7e4}}}, "full_attention has its own rotary positions"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}},
            "rope_type is 'yarn', but type is 'linear'",
        ),
        ({"rope_scaling": TWICE, "rope_parameters": TWICE | {"factor": 3}}, "rope_scaling and rope_parameters differ"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 32},
            "original_max_position_embeddings is 32 here and None beside the type 'yarn'",
        ),
        ({"rope_scaling": {"factor": 4.0}}, "factor is 4.0, but there is no type"),
        ({"rope_theta": "x"}, "rope_theta is 'x'"),
        ({"rope_parameters": [1]}, "must be a JSON object"),
        ({"head_dim": 7}, "even size"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "'longrope' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is "),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; it must be a finite number"),
        ({"num_hidden_layers": 2_000_000_000}, "num_hidden_layers is 2000000000"),
        ({"logit_alignment": "twice"}, "logit_alignment is 'twice'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: field 'factor' is missing"),
        ({"eos_token_id": None}, "eos_token_id is missing"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"model_type": "Dream"}, "'mask_token_id' is missing"),
        ({"model_type": "gpt2"}, "'gpt2'; known types: Dream, llada, llama, qwen2, qwen3"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_would_load_and_be_wrong_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        read(**changes)


def test_real_sizes_have_their_published_number_of_parameters():
    """LLaDA, Dream (Qwen2.5-7B's body), and Qwen3-0.6B, whose heads are wider than its stream."""
    qwen3 = LLAMA | dict(
        model_type="qwen3", vocab_size=151936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, intermediate_size=3072, tie_word_embeddings=True,
    )  # fmt: skip
    llada, dream = PUBLISHED["GSAI-ML/LLaDA-8B-Base"], PUBLISHED["Dream-org/Dream-v0-Instruct-7B"]
    for config, count in ((llada, 8_015_581_184), (dream, 7_615_616_512), (qwen3, 596_049_920)):
        assert count_params(registry.param_table(registry.from_hf(config, ""))) == count

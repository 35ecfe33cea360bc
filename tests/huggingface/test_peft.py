"""Tests adapters in PEFT's format: the fixture's, their ranks and scales, and those that do not fit the base."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxblock.errors import UserError
from jaxblock.huggingface import peft
from jaxblock.huggingface.load import load_checkpoint
from jaxblock.huggingface.placement import tensor_names
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import Lora, adapter_table, attach, merge
from jaxblock.models.spec import flatten
from jaxblock.models.transformer import Transformer
from tests.huggingface.breaking import Break, fields, tensors
from tests.models.networks import random_params

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def test_the_reference_adapters_unmerged_merged_and_written_back(shared, tmp_path):
    trained, golden = shared / "golden" / "train", tmp_path / "golden"
    golden.mkdir()
    # As PEFT stores them: the fixture leaves out the wrapper's prefix.
    stored = load_file(trained / "lora.final.safetensors")
    save_file({f"base_model.model.{name}": value for name, value in stored.items()}, golden / WEIGHTS)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none"}
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "up_proj"]
    (golden / CONFIG).write_text(json.dumps(config))
    arch, base = load_checkpoint(shared / "golden" / "forward" / "llada_mha")
    lora, adapters = peft.load_adapter(golden, arch)
    table = registry.param_table(arch)
    assert lora == Lora(8, 16.0, 0.0, ("blocks/q", "blocks/k", "blocks/v", "blocks/up"))
    both = attach(base, adapters)
    oracle = np.load(trained / "lora.merged_logits.npz")
    ids = oracle["noisy_ids"].astype(np.int32)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    length = np.full(len(ids), ids.shape[1], np.int32)
    merged = jax.device_get(jax.jit(merge, static_argnums=1)(both, lora))
    for net, params in ((Transformer(arch, lora=lora), both), (Transformer(arch), merged)):
        got = jax.jit(net.all_logits)(params, ids, positions, length)
        assert np.abs(got - oracle["logits"]).max() <= 2e-5 * np.abs(oracle["logits"]).max()
    for name, want in load_file(trained / "lora.merged.safetensors").items():
        places = ((path, layer) for path in table for layer in range(2))
        path, layer = next(at for at in places if table[at[0]].hf_name.format(layer=at[1]) == name)
        np.testing.assert_allclose(flatten(merged)[path][layer].T, want, rtol=1e-6, atol=1e-7)

    peft.save_adapter(tmp_path / "out", arch, lora, adapters, base="GSAI-ML/LLaDA-8B-Instruct")
    chex.assert_trees_all_equal(load_file(golden / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS))
    assert peft.is_adapter(tmp_path / "out") and peft.read_base_name(tmp_path / "out") == "GSAI-ML/LLaDA-8B-Instruct"
    assert peft.load_adapter(tmp_path / "out", arch)[0] == lora
    with pytest.raises(UserError, match="exists"):
        peft.save_adapter(tmp_path / "out", arch, lora, adapters, base=None)


def test_target_names_hit_the_adapted_modules_and_no_others(small, tmp_path):
    """PEFT's own rule is applied: a list matches last components, a string is a regular expression of the whole name."""
    for family, tied in (("llada", False), ("llada", True), ("dream", False)):
        table = registry.param_table(small(family, tie_embeddings=tied)[0])
        names = ((name, path) for path, spec in table.items() for name in tensor_names(spec))
        modules = {name.removesuffix(".weight"): path for name, path in names if name.endswith(".weight")}
        every = tuple(f"blocks/{name}" for name in ("q", "k", "v", "o", "gate", "up", "down"))
        for targets in (("blocks/q", "blocks/v"), ("blocks/down",), ("blocks/q", "blocks/o", "blocks/down"), every):
            found = peft.target_modules(table, Lora(2, 4.0, 0.0, targets))
            listed = isinstance(found, list)
            assert listed == (family == "dream" or tied or "blocks/down" not in targets)
            hits = {n for n in modules if (n.rsplit(".", 1)[-1] in found if listed else re.fullmatch(found, n))}
            assert hits == {name for name, path in modules.items() if path in targets}
            (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": found}))
            assert hits == set(filter(peft.read_adapter_config(tmp_path / CONFIG).adapts, modules))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


PREFIX = "base_model.model.model.transformer."
Q0A = PREFIX + "blocks.0.q_proj.lora_A.weight"


def other_base(held: dict[str, np.ndarray]) -> None:
    """Breaks four things at once: another width, a layer too many, one too few, and an adapted head."""
    held[Q0A] = held[Q0A][:, :8].copy()
    held[PREFIX + "blocks.9.q_proj.lora_A.weight"] = np.ones((4, 16), np.float32)
    held[PREFIX + "ff_out.lora_A.weight"] = np.ones((4, 16), np.float32)
    del held[PREFIX + "blocks.2.down_proj.lora_B.weight".replace("down_proj", "ff_out")]


def names_of_llama(held: dict[str, np.ndarray]) -> None:
    for name in list(held):
        held[name.replace("transformer.blocks", "layers")] = held.pop(name)


OTHER_BASE = (
    r"(?s)do not fit their base \(llada, 3 layers, width 16\).*missing \(1\): .*blocks\.2\.ff_out\.lora_B.*"
    r"not of this base \(2\): .*blocks\.9\.q_proj.*ff_out.*wrong shape \(1\): .*\[4, 8\], not \[4, 16\]"
)
ONE_TARGET = {"target_modules": ["q_proj"]}
# Fields of adapter_config.json, and what is said about them.
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "not lora": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "dora": ({"use_dora": True}, "use_dora is True: not supported.*merge_and_unload"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4': not supported"),
    "unknown": ({"use_newora": 2, "note": None}, "the setting 'use_newora' is unknown"),
    "patterns": ({"rank_pattern": {"q_proj": 2}}, r"(?s)wrong shape.*q_proj.*is \[4, 16\], not \[2, 16\]"),
    "pattern of no number": ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\[q_proj\] is 'x'; it must be a finite"),
    "pattern of no name": ({"rank_pattern": {"(": 2}}, r"rank_pattern is '\('; it must be a regular expression"),
    **{
        f"pattern without end {text}": ({"target_modules": text}, "target_modules is .* a simpler regular expression")
        for text in ("(.|.)*x", "(?>(.|.)*x)", "(.|.)" * 40 + "x", ".*" * 6 + "x", "(a?){90}x", "(?!(.*)*x).")
    },
    "patterns without end": ({"rank_pattern": {f"q{i}.*": 2 for i in range(5000)}}, "rank_pattern is .* fewer or simpler"),
    "pattern of no kind": ({"rank_pattern": [2]}, r"rank_pattern is \[2\]; it must be an object"),
    "no alpha": ({"lora_alpha": "x"}, "lora_alpha is 'x'; it must be a finite number"),
    "no dropout": ({"lora_dropout": 5}, "lora_dropout is 5; it must be a number from 0 to 1"),
    "no layer": (ONE_TARGET | {"layers_to_transform": "0"}, "layers_to_transform is '0'; it must be a layer"),
    "fewer targets": (ONE_TARGET, r"not adapted by adapter_config.json .*\(6\): .*ff_out.lora_A"),
    "no targets": ({"target_modules": None}, "target_modules is missing or empty"),
    "fewer layers": (
        {"target_modules": ["q_proj", "ff_out"], "layers_to_transform": [0, 1]}, r"(?s)not adapted by .*\(4\)",
    ),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "no rank": ({"r": True}, "r is True"),
    "another rank": ({"r": 5}, r"(?s)wrong shape.*is \[4, 16\], not \[5, 16\]"),
}  # fmt: skip
CASES: dict[str, tuple[Break, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no adapter_config.json"),
    "not a number": (
        tensors(WEIGHTS, lambda t: t[Q0A].__setitem__((0, 0), np.nan)),
        "tensor .*q_proj.lora_A.* holds NaN",
    ),
    "another base": (tensors(WEIGHTS, other_base), OTHER_BASE),
    "another family": (tensors(WEIGHTS, names_of_llama), r"(?s)missing \(12\).*not of this base \(12\)"),
    "pickle": (pickled, r"adapter_model\.bin.*never unpickles"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "cut short": (cut, r"(?s)damaged.*cut short"),
    "no numbers": (tensors(WEIGHTS, lambda t: t.update({Q0A: t[Q0A].astype(np.int32)})), "unsupported type.*I32"),
    **{name: (fields(CONFIG, **changes), said) for name, (changes, said) in FIELDS.items()},
}


def one_scale(rank: int, scale: float, names: tuple[str, ...], layers: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    return {f"model.layers.{i}.{name}": (rank, scale) for i in layers for name in names}


Q, V, UP = "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"
# The rank and the scale of each adapted module, as PEFT computes them from these settings.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": ({"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, one_scale(4, 3.0, (Q, V))),
    "no effect": ({"target_modules": ["q_proj"], "fan_in_fan_out": True, "loftq_config": {}}, one_scale(4, 1.5, (Q,))),
    "patterns": (
        # The first pattern that fits counts, and it must fit the whole end of a name.
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, "q_proj": 2, "proj": 9},
            "alpha_pattern": {r".*\.[02]\..*v_proj": 10, "up_proj": 0},
        },
        one_scale(2, 3.0, (Q,)) | one_scale(7, 6 / 7, (Q,), (1,)) | one_scale(4, 2.5, (V,)) | one_scale(4, 1.5, (V,), (1,))
        | one_scale(4, 0.0, (UP,)),
    ),
    "patterns and rslora": (
        {"target_modules": ["v_proj"], "use_rslora": True, "rank_pattern": {"^model.layers.0.self_attn.v_proj": 9}},
        one_scale(4, 3.0, (V,)) | one_scale(9, 2.0, (V,), (0,)),
    ),
    "some layers": (
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        one_scale(4, 1.5, (Q,), (0, 2)) | one_scale(4, 1.5, (UP,), (0,)),
    ),
    "one expression": (
        {"target_modules": r".*\.1\..*(q|up)_proj", "exclude_modules": ["up_proj"]}, one_scale(4, 1.5, (Q,), (1,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_ranks_and_scales_are_those_of_peft(small, tmp_path, case):
    settings, modules = SETTINGS[case]
    arch, _ = small("llama")
    table = registry.param_table(arch)
    paths = {name: path for path, spec in table.items() for name in tensor_names(spec)}
    draw, stored = np.random.default_rng(0), {}
    want: dict[str, np.ndarray] = {}
    for module, (rank, scale) in modules.items():
        _, n_in, n_out = table[paths[f"{module}.weight"]].shape
        a, b = draw.normal(size=(rank, n_in)).astype(np.float32), draw.normal(size=(n_out, rank)).astype(np.float32)
        stored |= {f"base_model.model.{module}.lora_{x}.weight": value for x, value in (("A", a), ("B", b))}
        want[module] = scale * (b @ a).T
    save_file(stored, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6, **settings}))
    lora, adapters = peft.load_adapter(tmp_path, arch)
    flat = flatten(adapters)
    assert set(lora.targets) == {paths[f"{module}.weight"] for module in modules}
    for path in lora.targets:
        got = np.asarray(flat[f"{path}/a"]) @ np.asarray(flat[f"{path}/b"]) * lora.scale
        for layer, name in enumerate(tensor_names(table[path])):
            np.testing.assert_allclose(got[layer], want.get(name.removesuffix(".weight"), 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_adapter_of_this_base(small, tmp_path, case):
    break_it, message = CASES[case]
    arch, _ = small("llada")
    lora = Lora(4, 8.0, 0.1, ("blocks/q", "blocks/down"))
    adapters = jax.device_put(random_params(adapter_table(registry.param_table(arch), lora)))
    peft.save_adapter(tmp_path / "out", arch, lora, adapters, base=None)
    with pytest.raises(UserError, match="say where the base is"):
        peft.read_base_name(tmp_path / "out")
    break_it(tmp_path / "out")
    with pytest.raises(UserError, match=message) as caught:
        peft.load_adapter(tmp_path / "out", arch)
    assert str(tmp_path / "out") in str(caught.value)

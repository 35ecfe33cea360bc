"""Tests adapters in PEFT's format: the fixture's, their ranks and scales, their base, and those that do not fit it."""

import dataclasses
import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxblock
from jaxblock.errors import UserError
from jaxblock.huggingface import peft
from jaxblock.huggingface.placement import tensor_names
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import Lora, adapter_table, attach, merge
from jaxblock.models.spec import flatten
from jaxblock.types import Params
from tests.huggingface.breaking import Break, change
from tests.models.networks import random_params

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = np.arange(3, 15).reshape(2, 6)


def drawn(arch: Architecture, lora: Lora) -> Params:
    return jax.device_put(random_params(adapter_table(registry.param_table(arch), lora), std=0.3))


def test_the_reference_adapters_unmerged_merged_and_written_back(shared, tmp_path):
    trained, golden = shared / "golden" / "train", tmp_path / "golden"
    golden.mkdir()
    # As PEFT stores them: the fixture leaves out the wrapper's prefix.
    stored = load_file(trained / "lora.final.safetensors")
    save_file({f"base_model.model.{name}": value for name, value in stored.items()}, golden / WEIGHTS)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none"}
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "up_proj"]
    (golden / CONFIG).write_text(json.dumps(config))
    model = jaxblock.load(golden, base=shared / "golden" / "forward" / "llada_mha")
    arch, lora, merged = model.arch, model.net.lora, model.merged()
    assert lora == Lora(8, 16.0, 0.0, ("blocks/q", "blocks/k", "blocks/v", "blocks/up"))
    oracle = np.load(trained / "lora.merged_logits.npz")
    for each in (model, merged):
        difference = np.abs(each.logits(oracle["noisy_ids"]) - oracle["logits"]).max()
        assert difference <= 2e-5 * np.abs(oracle["logits"]).max()
    names = {path: tensor_names(spec) for path, spec in registry.param_table(arch).items()}
    for name, want in load_file(trained / "lora.merged.safetensors").items():
        [(path, layer)] = [(path, of_path.index(name)) for path, of_path in names.items() if name in of_path]
        np.testing.assert_allclose(flatten(merged.params)[path][layer].T, want, rtol=1e-6, atol=1e-7)

    save = partial(peft.save_adapter, tmp_path / "out", arch, lora, model.params["lora"], base="GSAI-ML/LLaDA-8B-Base")
    save()
    chex.assert_trees_all_equal(load_file(golden / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS))
    assert peft.is_adapter(tmp_path / "out") and peft.read_base_name(tmp_path / "out") == "GSAI-ML/LLaDA-8B-Base"
    assert peft.load_adapter(tmp_path / "out", arch)[0] == lora
    with pytest.raises(UserError, match="exists"):
        save()


def test_target_names_hit_the_adapted_modules_and_no_others(small, tmp_path):
    """A list matches last components, as in PEFT; where it would hit more, a regular expression of the whole name is written."""
    every = tuple(f"blocks/{name}" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    for family, tied in (("llada", False), ("llada", True), ("dream", False)):
        table = registry.param_table(small(family, tie_embeddings=tied)[0])
        names = ((name, path) for path, spec in table.items() for name in tensor_names(spec))
        modules = {name.removesuffix(".weight"): path for name, path in names if name.endswith(".weight")}
        for targets in (("blocks/q", "blocks/v"), ("blocks/down",), ("blocks/q", "blocks/o", "blocks/down"), every):
            found = peft.target_modules(table, Lora(2, 4.0, 0.0, targets))
            assert isinstance(found, list) == (family == "dream" or tied or "blocks/down" not in targets)
            (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": found}))
            hits = filter(peft.read_adapter_config(tmp_path / CONFIG).adapts, modules)
            assert set(hits) == {name for name, path in modules.items() if path in targets}


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


PREFIX = "base_model.model.model.transformer."
Q0A = PREFIX + "blocks.0.q_proj.lora_A.weight"
weights = partial(change, WEIGHTS)


def other_base(held: dict[str, np.ndarray]) -> None:
    """Breaks four things at once: another width, a layer too many, one too few, and an adapted head."""
    held[Q0A] = held[Q0A][:, :8].copy()
    held[PREFIX + "blocks.9.q_proj.lora_A.weight"] = np.ones((4, 16), np.float32)
    held[PREFIX + "ff_out.lora_A.weight"] = np.ones((4, 16), np.float32)
    del held[PREFIX + "blocks.2.ff_out.lora_B.weight"]


def names_of_llama(held: dict[str, np.ndarray]) -> None:
    for name in list(held):
        held[name.replace("transformer.blocks", "layers")] = held.pop(name)


OTHER_BASE = (
    r"(?s)do not fit their base \(llada, 3 layers, width 16\).*missing \(1\): .*blocks\.2\.ff_out\.lora_B.*"
    r"not of this base \(2\): .*blocks\.9\.q_proj.*ff_out.*wrong shape \(1\): .*\[4, 8\], not \[4, 16\]"
)
ONE_TARGET = {"target_modules": ["q_proj"]}
TWO_LAYERS = {"target_modules": ["q_proj", "ff_out"], "layers_to_transform": [0, 1]}
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
    "patterns without end": ({"rank_pattern": {f"q{i}.*": 2 for i in range(400)}}, "rank_pattern is .* fewer or simpler"),
    "pattern of no kind": ({"rank_pattern": [2]}, r"rank_pattern is \[2\]; it must be an object"),
    "no alpha": ({"lora_alpha": "x"}, "lora_alpha is 'x'; it must be a finite number"),
    "no dropout": ({"lora_dropout": 5}, "lora_dropout is 5; it must be a number from 0 to 1"),
    "no layer": (ONE_TARGET | {"layers_to_transform": "0"}, "layers_to_transform is '0'; it must be a layer"),
    "fewer targets": (ONE_TARGET, r"not adapted by adapter_config.json .*\(6\): .*ff_out.lora_A"),
    "no targets": ({"target_modules": None}, "target_modules is missing or empty"),
    "fewer layers": (TWO_LAYERS, r"(?s)not adapted by .*\(4\)"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "no rank": ({"r": True}, "r is True"),
    "another rank": ({"r": 5}, r"(?s)wrong shape.*is \[4, 16\], not \[5, 16\]"),
}  # fmt: skip
CASES: dict[str, tuple[Break, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no adapter_config.json"),
    "not a number": (weights(lambda t: t[Q0A].__setitem__((0, 0), np.nan)), "tensor .*q_proj.lora_A.* holds NaN"),
    "another base": (weights(other_base), OTHER_BASE),
    "another family": (weights(names_of_llama), r"(?s)missing \(12\).*not of this base \(12\)"),
    "pickle": (pickled, r"adapter_model\.bin.*never unpickles"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), r"(?s)damaged.*cut short"),
    "no numbers": (weights(lambda t: t.update({Q0A: t[Q0A].astype(np.int32)})), "unsupported type.*I32"),
    **{name: (change(CONFIG, **changes), said) for name, (changes, said) in FIELDS.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_adapter_of_this_base(small, tmp_path, case):
    break_it, message = CASES[case]
    arch, lora = small()[0], Lora(4, 8.0, 0.1, ("blocks/q", "blocks/down"))
    peft.save_adapter(tmp_path / "out", arch, lora, drawn(arch, lora), base=None)
    with pytest.raises(UserError, match="say where the base is"):
        peft.read_base_name(tmp_path / "out")
    break_it(tmp_path / "out")
    with pytest.raises(UserError, match=message) as caught:
        peft.load_adapter(tmp_path / "out", arch)
    assert str(tmp_path / "out") in str(caught.value)


def one_scale(rank: int, scale: float, names: tuple[str, ...], layers: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    return {f"model.layers.{i}.{name}": (rank, scale) for i in layers for name in names}


Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
# The rank and the scale of each adapted module, as PEFT computes them from these settings, an r of 4 and a lora_alpha of 6.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}, one_scale(4, 1.5, (Q, K, O, DOWN))),
    "rslora": ({"target_modules": "all-linear", "use_rslora": True}, one_scale(4, 3.0, (Q, K, V, O, GATE, UP, DOWN))),
    "no effect": (
        {"target_modules": ["q_proj", "model.layers.2.mlp.up_proj"], "layers_to_transform": 1, "fan_in_fan_out": True},
        one_scale(4, 1.5, (Q,), (1,)) | one_scale(4, 1.5, (UP,), (2,)),
    ),
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


@pytest.mark.parametrize(
    ("base", "fields", "read"),
    [
        ("org/base@v2.0", ("org/base", "v2.0"), "org/base@v2.0"),
        ("org/base", ("org/base", None), "org/base"),
        ("./a folder@v2", ("./a folder@v2", None), "./a folder@v2"),
    ],
)
def test_the_bases_revision_is_written_and_read_as_peft_does(small, tmp_path, base, fields, read):
    arch, _ = small()
    lora = Lora(2, 4.0, 0.0, ("blocks/q",))
    peft.save_adapter(tmp_path / "out", arch, lora, drawn(arch, lora), base=base)
    held = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (held["base_model_name_or_path"], held["revision"]) == fields
    assert peft.read_base_name(tmp_path / "out") == read
    (tmp_path / "out" / CONFIG).write_text(json.dumps(held | {"revision": 2}))
    with pytest.raises(UserError, match="revision is 2; it must be a text"):
        peft.read_base_name(tmp_path / "out")


def test_a_folder_of_adapters_is_its_base_and_them(small, saved, tmp_path):
    (arch, params), lora = small(), Lora(2, 4.0, 0.0, ("blocks/q", "blocks/down"))
    folder, base = tmp_path / "adapters", shutil.copytree(saved(), tmp_path / "base")
    peft.save_adapter(folder, arch, lora, drawn(arch, lora), base=str(base))
    merged = jax.jit(merge, static_argnums=1)(attach(params, drawn(arch, lora)), lora)
    want = dataclasses.replace(jaxblock.load(base), params=merged).logits(IDS)
    np.testing.assert_allclose(jaxblock.load(folder).logits(IDS), want, atol=1e-5)
    moved = jaxblock.load(folder, base=base.rename(tmp_path / "moved"), quantize="int8")
    assert 0 < np.abs(moved.logits(IDS) - want).max() < 0.15 * np.abs(want).max()
    for place, complaint in ((None, "base"), (saved("llada", d_model=32, head_dim=8), "do not fit their base")):
        with pytest.raises(UserError, match=complaint):
            jaxblock.load(folder, base=place)


def test_adapters_of_an_autoregressive_start_decode_as_they_were_trained(saved, tmp_path):
    start, lora = saved("llama", mask_id=None), Lora(2, 4.0, 0.0, ("blocks/q",))

    def adapted(**options: Any) -> jaxblock.Model:
        model = jaxblock.load(start, **options)
        net, params = dataclasses.replace(model.net, lora=lora), attach(model.params, drawn(model.arch, lora))
        return dataclasses.replace(model, net=net, params=params, base=str(start))

    adapted(mask_id=39, alignment="same_position").save_adapter(tmp_path / "adapter")
    again = jaxblock.load(tmp_path / "adapter")
    assert (again.arch.mask_id, again.arch.alignment) == (39, "same_position")

    model = adapted(mask_id=40)
    # As a run's model.json gives it: what was read says the longer vocabulary too.
    grown = registry.from_hf(registry.to_hf(model.arch, "float32"), "model.json")
    model = dataclasses.replace(model, net=dataclasses.replace(model.net, arch=grown))
    with pytest.raises(UserError, match="vocabulary grew from 40 to 64 rows.*export the merged network"):
        model.save_adapter(tmp_path / "rows")

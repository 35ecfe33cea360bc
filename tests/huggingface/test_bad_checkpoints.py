"""Tests that everything wrong with a checkpoint folder is named, all at once, before a tensor is read."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxblock.errors import UserError
from jaxblock.huggingface.load import load_checkpoint
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from tests.huggingface.breaking import Break, fields, tensors
from tests.models.networks import random_params

TOKENS = {"vocab_size": 24, "mask_id": 23, "eos_id": 1, "pad_id": 1, "max_len": 64, "tie_embeddings": False}
LAYERS = {"d_model": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "head_dim": 4, "mlp_dim": 12}
ARCH = Architecture(family="llada", norm_eps=1e-5, rope_theta=1e4, **TOKENS, **LAYERS)
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q0 = "model.transformer.blocks.0.q_proj.weight"
Q1 = "model.transformer.blocks.1.q_proj.weight"
HEAD = "model.transformer.ff_out.weight"


PARAMS = jax.device_put(random_params(registry.param_table(ARCH)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Writes a sound checkpoint in one file, and one in several."""
    root = tmp_path_factory.mktemp("sound")
    save_checkpoint(root / "checkpoint", ARCH, PARAMS)
    save_checkpoint(root / "sharded", ARCH, PARAMS, max_shard_bytes=2000)
    return root


@pytest.fixture
def copied(sound, tmp_path):
    """Returns a function that copies one of them."""
    return lambda kind="checkpoint": Path(shutil.copytree(sound / kind, tmp_path / kind))


change, config = partial(tensors, FILE), partial(fields, "config.json")


def resize(n_bytes: int) -> Break:
    """Returns a function that cuts the file short, or lengthens it."""

    def apply(folder: Path) -> None:
        whole = (folder / FILE).read_bytes()
        (folder / FILE).write_bytes((whole + b"\0" * 64)[: len(whole) + n_bytes])

    return apply


def many(tensors: dict[str, np.ndarray]) -> None:
    """Breaks four things at once."""
    del tensors[HEAD]
    tensors["surprise"] = np.ones(3, np.float32)
    tensors[Q0] = tensors[Q0][:, :5].copy()
    tensors[Q1] = np.ones((8, 8), np.int32)


def pickled(folder: Path) -> None:
    (folder / FILE).rename(folder / "pytorch_model.bin")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps({"a": 1}))


def reindex(edit: Callable[[dict[str, str]], Any]) -> Break:
    """Returns a function that breaks the index."""
    return fields(INDEX, lambda index: edit(index["weight_map"]))


def shard_of_the_head(folder: Path) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][HEAD]


def garble_header(folder: Path) -> None:
    path = shard_of_the_head(folder)
    path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"dtyqe"'))


FOUR = (
    rf"(?s)missing \(1\): {HEAD}.*not expected \(1\): surprise.*wrong shape \(1\): {Q0} is \[8, 5\], .*\[8, 8\]"
    rf".*unsupported type \(1\): {Q1} is I32"
)
CUT = rf"damaged \(21\).*{HEAD} \(cut short: model\.safetensors has 767 of its 768 bytes\)"
OTHER_SHARD = rf"damaged \(1\): {HEAD} \({INDEX} says it is in model-\d+-of-\d+\.safetensors, which does not hold it\)"
BAD_HEADER = rf"(?s)not a whole safetensors file.*damaged.*{HEAD} \(its file .* cannot be read\)"
CASES: dict[str, tuple[Break, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json.*JSON"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "unknown family": (config(model_type="gpt2"), r"'gpt2'.*known types: .*llada"),
    "unsupported option": (config(alibi=True), "alibi is True"),
    "missing": (change(lambda t: t.pop(HEAD)), rf"missing \(1\): {HEAD}$"),
    "extra": (change(lambda t: t.update(surprise=t[HEAD])), r"not expected \(1\): surprise"),
    "all at once": (change(many), FOUR),
    "config and tensors": (config(n_layers=3, mlp_hidden_size=16), r"(?s)blocks\.2\.attn_n.*is \[12, 8\].*\[16, 8\]"),
    "mixed types": (change(lambda t: t.update({Q0: t[Q0].astype("f2")})), rf"different types.*{Q0} F16, {Q1} F32"),
    "float64": (change(lambda t: t.update({HEAD: t[HEAD].astype(np.float64)})), rf"float64.*{HEAD}"),
    "cut by a byte": (resize(-1), CUT),
    "cut in the header": (resize(-(10**9)), "not a whole safetensors file"),
    "too long": (resize(8), "not a whole safetensors file"),
    "mask id outside": (config(mask_token_id=24), r"config\.json: mask_token_id is 24, outside the vocabulary of 24"),
    "mask id no id": (config(mask_token_id="<mask>"), "mask_token_id is '<mask>'; it must be a token's id"),
    "no mask id": (config(mask_token_id=None), "mask_token_id.*missing"),
    "end outside": (config(eos_token_id=[1, 99]), "eos_token_id is 99, outside"),
    "no end": (config(eos_token_id=[]), "eos_token_id is an empty list"),
    "stretched": (config(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_scaling is set"),
    "clipped": (config(clip_qkv=8.0), "clip_qkv is 8.0"),
    "groups": (config(n_kv_heads=3), "no multiple of 3"),
    "heads": (config(d_model=9), "does not split into 2 heads"),
    "no safetensors": (lambda f: (f / FILE).unlink(), r"no \*\.safetensors file"),
    "pickle": (pickled, r"pytorch_model\.bin\), no safetensors.*never unpickles.*save_file"),
    "more layers than tensors": (config(n_layers=9_999), "9,999 layers need more tensors than the 21 "),
    "quantised": (config(quantization_config={"load_in_8bit": True}), "quantization_config is "),
    "sizes of no kind": (config(mlp_hidden_size=None, mlp_ratio={}), r"mlp_ratio is \{\}; it must be a finite number"),
}  # fmt: skip
SHARDED: dict[str, tuple[Break, str]] = {
    "shard missing": (lambda f: shard_of_the_head(f).unlink(), rf"(?s)damaged.*{HEAD} \(its file model-.* is missing\)"),
    "bad header": (garble_header, BAD_HEADER),
    "index wrong": (reindex(lambda m: m.update({HEAD: m[Q0]})), OTHER_SHARD),
    "index points outside": (reindex(lambda m: m.update({HEAD: "../../etc/passwd"})), "must lie in the folder itself"),
    "index names no file": (reindex(lambda m: m.update({HEAD: "x" * 300})), "can be no file's name"),
    "no index at all": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "no weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, *SHARDED])
def test_what_is_wrong_with_a_folder_is_named(copied, case):
    folder = copied("sharded" if case in SHARDED else "checkpoint")
    break_it, message = (CASES | SHARDED)[case]
    break_it(folder)
    with pytest.raises(UserError, match="(?m)" + message) as caught:
        load_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_code_in_a_checkpoint_is_carried_and_never_run(copied, tmp_path):
    """config.json's auto_map names code in the folder, as in the published checkpoints."""
    folder = copied()
    for name in ("modeling_llada.py", "configuration_llada.py", "tokenization_llada.py", "__init__.py", "setup.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    names = {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}
    config(auto_map=names)(folder)
    arch, params = load_checkpoint(folder)
    save_checkpoint(tmp_path / "again", arch, params, tokenizer=folder)
    load_checkpoint(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_llada.py").read_text() == (folder / "modeling_llada.py").read_text()
    assert not (tmp_path / "again" / "setup.py").exists()
    assert not (tmp_path / "ran").exists() and not any("llada" in name and "models" not in name for name in sys.modules)


def test_adapters_are_not_exported_as_a_checkpoint(tmp_path):
    advice = r"hold LoRA adapters.*merge them first \(jaxblock\.models\.linear\.lora\.merge\)"
    with pytest.raises(UserError, match=advice):
        save_checkpoint(tmp_path / "out", ARCH, {**PARAMS, "lora": {"blocks": {}}})
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no such folder"):
        load_checkpoint(tmp_path / "out")


def test_a_cast_mends_what_cannot_be_kept(copied):
    folder = copied()
    change(lambda t: t.update({Q0: t[Q0].astype(np.float16), HEAD: t[HEAD].astype(np.float64)}))(folder)
    assert load_checkpoint(folder, dtype=jnp.bfloat16)[1]["head"].dtype == jnp.bfloat16


def stray(*names: str) -> Break:
    """Returns a function that puts files with other tensors, and with other values of the checkpoint's own, into a folder."""

    def apply(folder: Path) -> None:
        for name in names:
            save_file({"other.weight": np.ones(2, np.float32), Q0: np.ones((8, 8), np.float32)}, folder / name)

    return apply


def earlier_shards(folder: Path) -> None:
    """Leaves the shards and the index of an earlier save beside the file of the newest."""
    stray("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {Q0: "model-00001-of-00002.safetensors"}}))


def tables(held: dict[str, np.ndarray]) -> None:
    """Adds the tables of rotary positions that older versions of transformers stored."""
    held["model.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    held["model.layers.1.self_attn.rotary_emb.cos_cached"] = np.full(2, np.nan, np.float32)


OTHERS = stray("adapter_model.safetensors", "consolidated.00.safetensors", "model.fp16.safetensors")
FORMS: dict[str, tuple[str, Break]] = {
    "earlier shards": ("checkpoint", earlier_shards),
    "other files": ("checkpoint", OTHERS),
    "tables": ("checkpoint", change(tables)),
    "shards": ("sharded", lambda f: None),
    "shards and other files": ("sharded", OTHERS),
    "shards without an index": ("sharded", lambda f: (f / INDEX).unlink()),
    "other files, no index": ("sharded", lambda f: [(f / INDEX).unlink(), stray("adapter_model.safetensors")(f)]),
    "a promised table": ("sharded", reindex(lambda m: m.update({"model.rotary_emb.inv_freq": m[Q0]}))),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms_of_a_folder_that_mean_the_same(copied, case):
    kind, alter = FORMS[case]
    folder = copied(kind)
    alter(folder)
    chex.assert_trees_all_equal(jax.device_get(load_checkpoint(folder)[1]), jax.device_get(PARAMS))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_a_number_that_is_none_is_told_with_its_tensor(copied, dtype):
    folder = copied()

    def put(value: float) -> None:
        change(lambda t: t.update({name: x.astype(dtype) for name, x in t.items()}))(folder)
        change(lambda t: t[Q1].__setitem__((2, 3), value))(folder)

    for value in (np.nan, -np.nan, np.inf, -np.inf):
        put(value)
        with pytest.raises(UserError, match=f"{Q1} holds NaN or infinite numbers"):
            load_checkpoint(folder)
    for value in (float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).min), -0.0):
        put(value)
        load_checkpoint(folder)

"""Tests that everything wrong with a checkpoint folder is named, all at once, before a tensor is read."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
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
from tests.huggingface.breaking import Break, change

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q0 = "model.transformer.blocks.0.q_proj.weight"
Q1 = "model.transformer.blocks.1.q_proj.weight"
HEAD = "model.transformer.ff_out.weight"


@pytest.fixture(scope="module")
def sharded(small, tmp_path_factory):
    """Writes a sound checkpoint in several files."""
    save_checkpoint(tmp_path_factory.mktemp("sharded") / "out", *small(), max_shard_bytes=3000)
    return tmp_path_factory.getbasetemp() / "sharded0" / "out"


@pytest.fixture
def copied(saved, sharded, tmp_path):
    """Returns a function that copies a sound checkpoint, in one file or in several."""
    return lambda kind="checkpoint": shutil.copytree(sharded if kind == "sharded" else saved(), tmp_path / kind)


tensors, config = partial(change, FILE), partial(change, "config.json")


def content(edit: Callable[[bytes], bytes]) -> Break:
    """Returns a function that changes the bytes of the file."""
    return lambda folder: (folder / FILE).write_bytes(edit((folder / FILE).read_bytes()))


def many(held: dict[str, np.ndarray]) -> None:
    """Breaks four things at once."""
    held["surprise"] = held.pop(HEAD)
    held[Q0] = held[Q0][:, :5].copy()
    held[Q1] = np.ones((16, 16), np.int32)


def pickled(folder: Path) -> None:
    (folder / FILE).rename(folder / "pytorch_model.bin")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps({"a": 1}))


def reindex(edit: Callable[[dict[str, str]], Any]) -> Break:
    """Returns a function that breaks the index."""
    return change(INDEX, lambda index: edit(index["weight_map"]))


def shard_of_the_head(folder: Path) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][HEAD]


def garble_header(folder: Path) -> None:
    path = shard_of_the_head(folder)
    path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"dtyqe"'))


FOUR = (
    rf"(?s)missing \(1\): {HEAD}.*not expected \(1\): surprise.*wrong shape \(1\): {Q0} is \[16, 5\], .*\[16, 16\]"
    rf".*unsupported type \(1\): {Q1} is I32"
)
CUT = rf"damaged \(30\).*{HEAD} \(cut short: model\.safetensors has 2,559 of its 2,560 bytes\)"
OTHER_SHARD = rf"damaged \(1\): {HEAD} \({INDEX} says it is in model-\d+-of-\d+\.safetensors, which does not hold it\)"
BAD_HEADER = rf"(?s)not a whole safetensors file.*damaged.*{HEAD} \(its file .* cannot be read\)"
CASES: dict[str, tuple[Break, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json.*JSON"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "unknown family": (config(model_type="gpt2"), r"'gpt2'.*known types: .*llada"),
    "unsupported option": (config(alibi=True), "alibi is True"),
    "missing": (tensors(lambda t: t.pop(HEAD)), rf"missing \(1\): {HEAD}$"),
    "extra": (tensors(lambda t: t.update(surprise=t[HEAD])), r"not expected \(1\): surprise"),
    "all at once": (tensors(many), FOUR),
    "config and tensors": (config(n_layers=4, mlp_hidden_size=32), r"(?s)blocks\.3\.attn_n.*is \[24, 16\].*\[32, 16\]"),
    "mixed types": (tensors(lambda t: t.update({Q0: t[Q0].astype("f2")})), rf"different types.*{Q0} F16, {Q1} F32"),
    "float64": (tensors(lambda t: t.update({HEAD: t[HEAD].astype(np.float64)})), rf"float64.*{HEAD}"),
    "cut by a byte": (content(lambda b: b[:-1]), CUT),
    "cut in the header": (content(lambda b: b""), "not a whole safetensors file"),
    "too long": (content(lambda b: b + bytes(8)), "not a whole safetensors file"),
    "mask id outside": (config(mask_token_id=40), r"config\.json: mask_token_id is 40, outside the vocabulary of 40"),
    "mask id no id": (config(mask_token_id="<mask>"), "mask_token_id is '<mask>'; it must be a token's id"),
    "no mask id": (config(mask_token_id=None), "mask_token_id.*missing"),
    "end outside": (config(eos_token_id=[1, 99]), "eos_token_id is 99, outside"),
    "no end": (config(eos_token_id=[]), "eos_token_id is an empty list"),
    "stretched": (config(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_scaling is set"),
    "clipped": (config(clip_qkv=8.0), "clip_qkv is 8.0"),
    "groups": (config(n_kv_heads=3), "no multiple of 3"),
    "heads": (config(d_model=9), "does not split into 4 heads"),
    "no safetensors": (lambda f: (f / FILE).unlink(), r"no \*\.safetensors file"),
    "no folder": (shutil.rmtree, "no such folder"),
    "pickle": (pickled, r"pytorch_model\.bin\), no safetensors.*never unpickles.*save_file"),
    "more layers than tensors": (config(n_layers=9_999), "9,999 layers need more tensors than the 30 "),
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


def test_what_lies_beside_the_weights_travels_and_code_is_never_run(copied, tmp_path):
    """config.json's auto_map names code in the folder, as in the published checkpoints, or else in the family's repository."""
    folder, again, ran = copied(), tmp_path / "again", tmp_path / "ran"
    names = {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}
    config(auto_map=names)(folder)
    code = ["configuration_llada.py", "tokenization_llada.py", "generation_utils.py"]
    for name in (*code, "__init__.py", "setup.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w')\n")
    for name in ("tokenizer.model", "template.jinja", "old.safetensors", "notes.txt"):
        (folder / name).write_text(name)
    change("generation_config.json", steps=64, eos_token_id=0)(folder)
    save_checkpoint(again, *load_checkpoint(folder), tokenizer=folder)
    load_checkpoint(again)
    expected = "chat_template.jinja config.json generation_config.json model.safetensors template.jinja tokenizer.model"
    assert sorted(path.name for path in again.iterdir()) == sorted([*code, *expected.split()])
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in code)
    assert not ran.exists() and not any("llada" in name and "models" not in name for name in sys.modules)
    found = [json.loads((again / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert found[0]["auto_map"] == {**names, "AutoModel": "GSAI-ML/LLaDA-8B-Instruct--modeling_llada.LLaDAModelLM"}
    assert found[1] == {"steps": 64, "eos_token_id": [0, 1], "mask_token_id": 39, "pad_token_id": 2}


def stray(*names: str) -> Break:
    """Returns a function that puts files with other tensors, and with other values of the checkpoint's own, into a folder."""
    other = {"other.weight": np.ones(2, np.float32), Q0: np.ones((8, 8), np.float32)}
    return lambda folder: [save_file(other, folder / name) for name in names]


def earlier_shards(folder: Path) -> None:
    """Leaves the shards and the index of an earlier save beside the file of the newest."""
    stray("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {Q0: "model-00001-of-00002.safetensors"}}))


TABLES = {  # of rotary positions, that older versions of transformers stored
    "model.rotary_emb.inv_freq": np.ones(2, np.float32),
    "model.layers.1.self_attn.rotary_emb.cos_cached": np.full(2, np.nan, np.float32),
}
OTHERS = stray("adapter_model.safetensors", "consolidated.00.safetensors", "model.fp16.safetensors")
FORMS: dict[str, tuple[str, Break]] = {
    "earlier shards": ("checkpoint", earlier_shards),
    "other files": ("checkpoint", OTHERS),
    "tables": ("checkpoint", tensors(**TABLES)),
    "shards": ("sharded", lambda f: None),
    "shards and other files": ("sharded", OTHERS),
    "shards without an index": ("sharded", lambda f: (f / INDEX).unlink()),
    "other files, no index": ("sharded", lambda f: [(f / INDEX).unlink(), stray("adapter_model.safetensors")(f)]),
    "a promised table": ("sharded", reindex(lambda m: m.update({"model.rotary_emb.inv_freq": m[Q0]}))),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms_of_a_folder_that_mean_the_same(small, copied, case):
    kind, alter = FORMS[case]
    folder = copied(kind)
    alter(folder)
    chex.assert_trees_all_equal(jax.device_get(load_checkpoint(folder)[1]), jax.device_get(small()[1]))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_a_number_that_is_none_is_told_with_its_tensor(copied, dtype):
    folder, largest = copied(), jnp.finfo(dtype)
    tensors(lambda t: t.update({name: x.astype(dtype) for name, x in t.items()}))(folder)
    for value in (np.nan, -np.nan, np.inf, -np.inf, float(largest.max), float(largest.min), -0.0):
        tensors(lambda t, value=value: t[Q1].__setitem__((2, 3), value))(folder)
        told = nullcontext() if np.isfinite(value) else pytest.raises(UserError, match=f"{Q1} holds NaN or infinite")
        with told:
            load_checkpoint(folder)

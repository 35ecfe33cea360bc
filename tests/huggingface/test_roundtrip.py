"""Tests checkpoints in and out: bit-exact there and back, as another architecture, small in memory, safe on disk."""

import dataclasses
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxblock.errors import UserError
from jaxblock.huggingface import placement, tensor_writer
from jaxblock.huggingface.load import load_checkpoint, read_architecture
from jaxblock.huggingface.save import save_checkpoint, verify_checkpoint
from jaxblock.models.families import registry
from jaxblock.models.linear import int8
from jaxblock.models.spec import nest
from jaxblock.models.transformer import Transformer
from jaxblock.parallel.mesh import make_mesh
from jaxblock.parallel.rules import param_shardings
from jaxblock.types import Params
from tests.huggingface.breaking import fields


def assert_same_bits(a: Params, b: Params) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def stored(folder: Path) -> dict[str, Any]:
    """Returns the bytes of every tensor in a checkpoint's files, with its type and shape."""
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    return {name: (x.dtype, x.shape, x.tobytes()) for file in files for name, x in file.items()}


CHECKPOINTS = "llada-bfloat16 llada-float16-tied llada-float32 dream-bfloat16 llama-bfloat16-tied qwen2-float32-tied qwen3-bfloat16"


@pytest.mark.parametrize("which", CHECKPOINTS.split())
def test_import_export_import_keeps_every_bit(small, tmp_path, which):
    family, dtype, *tied = which.split("-")
    arch, params = small(family, dtype=jnp.dtype(dtype), tie_embeddings=bool(tied))
    # Every bit pattern that is not NaN must survive, zero's sign and subnormals too.
    embed = np.array(params["embed"])
    embed[0, :2] = np.array([-0.0, 1e-40]).astype(dtype)
    params = {**params, "embed": jax.device_put(embed)}
    save_checkpoint(tmp_path / "a", arch, params)
    arch_a, params_a = load_checkpoint(tmp_path / "a")
    assert_same_bits(params, params_a)
    save_checkpoint(tmp_path / "b", arch_a, params_a, max_shard_bytes=3000)
    assert stored(tmp_path / "b") == stored(tmp_path / "a") and len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert read_architecture(tmp_path / "b") == arch_a
    assert dataclasses.replace(arch_a, extra=(), init_std=arch.init_std) == arch
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == dtype


def test_shards_are_whole_named_and_below_the_limit(small, tmp_path):
    arch, params = small()
    save_checkpoint(tmp_path / "out", arch, params, max_shard_bytes=6000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    held = {name: load_file(tmp_path / "out" / name) for name in files}
    assert {tensor: file for file, tensors in held.items() for tensor in tensors} == index["weight_map"]
    sizes = {name: sum(t.nbytes for t in tensors.values()) for name, tensors in held.items()}
    assert max(sizes.values()) <= 6000 and sum(sizes.values()) == index["metadata"]["total_size"]


def test_casts_on_the_way_in_and_out(small, tmp_path):
    arch, params = small()
    save_checkpoint(tmp_path / "bf16", arch, params, dtype=jnp.bfloat16)
    _, loaded = load_checkpoint(tmp_path / "bf16")
    assert_same_bits(loaded, jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params))
    _, wide = load_checkpoint(tmp_path / "bf16", dtype=jnp.float32)
    assert_same_bits(wide, jax.tree.map(lambda x: np.asarray(x).astype(np.float32), loaded))


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("mesh", [(2, 2, 2), slow((8, 1, 1)), slow((2, 4, 1)), slow((1, 4, 2))])
def test_each_device_gets_its_slice(small, saved, tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(tensor_writer, "_SLICE_BYTES", 200)  # large matrices are fetched in slices; these are small
    arch, params = small("dream", jnp.bfloat16)
    shardings = param_shardings(make_mesh(*mesh), registry.param_table(arch))
    _, loaded = load_checkpoint(saved("dream", jnp.bfloat16), shardings=shardings)
    assert_same_bits(params, loaded)
    assert all(leaf.sharding == s for leaf, s in zip(jax.tree.leaves(loaded), jax.tree.leaves(shardings), strict=True))
    save_checkpoint(tmp_path / "again", arch, loaded)
    assert stored(tmp_path / "again") == stored(saved("dream", jnp.bfloat16))


@pytest.mark.parametrize("family, field", [("llada", "weight_tying"), ("llama", "tie_word_embeddings")])
def test_a_tied_checkpoint_may_repeat_its_head(saved, tmp_path, family, field):
    """A copy of the embedding may also be stored in another type, or be all there is; anything else is named, with its field."""
    folder = Path(shutil.copytree(saved(family), tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: True}))
    held = load_file(folder / "model.safetensors")
    embed, head = (registry.FAMILIES[family].names[name] + ".weight" for name in ("embed", "head"))
    for of_embed, of_head in (("f4", "f4"), ("f4", "f2"), ("f2", "f4"), ("f4", jnp.bfloat16), (jnp.bfloat16, "f2")):
        first = held[embed].astype(of_embed)
        save_file(held | {embed: first, head: first.astype(of_head)}, folder / "model.safetensors")
        assert load_checkpoint(folder, dtype=jnp.float32)[0].tie_embeddings
    rest = {name: held[name] for name in held if name not in (embed, head)}
    save_file(rest | {head: held[embed]}, folder / "model.safetensors")
    np.testing.assert_array_equal(load_checkpoint(folder)[1]["embed"], held[embed])
    changed = first.astype("f2")
    changed[5, 3] += 1
    for other in (changed, changed[:-1]):
        save_file(held | {embed: first, head: other}, folder / "model.safetensors")
        with pytest.raises(UserError, match=rf"{head} differs from {embed}.* set {field} to false"):
            load_checkpoint(folder, dtype=jnp.float32)


def test_companions_travel_and_weights_do_not(small, tmp_path):
    arch, params = small()
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.model", "template.jinja", "modeling_llada.py", "old.safetensors", "notes.txt"):
        (source / name).write_text(name)
    (source / "generation_config.json").write_text('{"steps": 64, "eos_token_id": 0}')
    save_checkpoint(tmp_path / "out", arch, params, tokenizer=source)
    names = "chat_template.jinja config.json generation_config.json model.safetensors modeling_llada.py template.jinja"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*names.split(), "tokenizer.model"]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"steps": 64, "eos_token_id": [0, 1], "mask_token_id": 39, "pad_token_id": 2}


def test_nothing_is_overwritten_and_nothing_half_written(small, tmp_path, monkeypatch):
    arch, params = small()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("words")
    with pytest.raises(UserError, match="mine"):
        save_checkpoint(tmp_path / "mine", arch, params)
    save_checkpoint(tmp_path / "out", arch, params)
    with pytest.raises(UserError, match="exists"):
        save_checkpoint(tmp_path / "out", arch, params)

    monkeypatch.setattr(tensor_writer.os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="full"):
        save_checkpoint(tmp_path / "late", arch, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_a_wrong_tree_is_not_exported(small, tmp_path):
    arch, params = small()
    wrong = {**params, "final_norm": np.ones(3, np.float32), "bonus": np.ones(1, np.float32)}
    del wrong["head"]
    listed = r"missing \(1\): head.*not expected \(1\): bonus.*final_norm is \[3\], not \[16\]"
    with pytest.raises(UserError, match=listed):
        save_checkpoint(tmp_path / "out", arch, wrong)
    with pytest.raises(UserError, match="embed is int32"):
        save_checkpoint(tmp_path / "out", arch, {**params, "embed": np.zeros((40, 16), np.int32)})


def test_verify_sees_a_changed_weight_and_a_changed_config(small, saved, tmp_path):
    arch, params = small()
    net, ids = Transformer(arch), jax.device_put(np.arange(12, dtype=np.int32).reshape(2, 6))

    def moved_by(much: float) -> Params:
        norm = np.array(params["final_norm"])
        norm[3] += much
        return {**params, "final_norm": jax.device_put(norm)}

    with pytest.raises(UserError, match="should be equal"):
        verify_checkpoint(saved(), net, moved_by(1e-3), ids)
    save_checkpoint(tmp_path / "holed", arch, moved_by(np.nan))
    with pytest.raises(UserError, match=r"tensor \S*ln_f.weight holds NaN or infinite"):
        verify_checkpoint(tmp_path / "holed", net, moved_by(np.nan), ids)
    save_checkpoint(tmp_path / "huge", arch, moved_by(3e38))  # finite weights, whose logits are not
    with pytest.raises(UserError, match="differ by nan"):
        verify_checkpoint(tmp_path / "huge", net, moved_by(3e38), ids)
    # Other types, other logits: reported, and no error.
    save_checkpoint(tmp_path / "out", arch, params, dtype=jnp.bfloat16)
    assert 0 < verify_checkpoint(tmp_path / "out", net, params, ids) < 1
    fields("config.json", mask_token_id=3)(tmp_path / "out")
    with pytest.raises(UserError, match="another network"):
        verify_checkpoint(tmp_path / "out", net, params, ids)


@pytest.mark.parametrize(
    "tied, mesh", [(False, None), (False, (2, 2, 2)), slow(False, (4, 2, 1)), slow(True, (1, 4, 2))]
)
def test_new_rows_are_the_mean_of_the_old(small, saved, tmp_path, tied, mesh):
    which: Any = {"family": "llama", "dtype": jnp.bfloat16, "mask_id": None, "tie_embeddings": tied}
    _, params = small(**which)
    wanted = registry.with_mask(read_architecture(saved(**which)), 40, "same_position")
    assert (wanted.vocab_size, wanted.mask_id, wanted.alignment) == (64, 40, "same_position")
    shardings = None if mesh is None else param_shardings(make_mesh(*mesh), registry.param_table(wanted))
    found, loaded = load_checkpoint(saved(**which), arch=wanted, shardings=shardings)
    assert found == wanted
    for name, axis in {"embed": 0, "head": 1}.items() if not tied else [("embed", 0)]:
        old, new = np.asarray(params[name], np.float32), np.asarray(loaded[name], np.float32)
        np.testing.assert_array_equal(np.take(new, np.arange(40), axis), old)
        mean = np.broadcast_to(np.expand_dims(old.mean(axis), axis), np.take(new, np.arange(24), axis).shape)
        np.testing.assert_allclose(np.take(new, np.arange(40, 64), axis), mean, rtol=2**-8)
        assert loaded[name].dtype == jnp.bfloat16 and (shardings is None or loaded[name].sharding == shardings[name])
    # What grew is written, and read again as it is.
    save_checkpoint(tmp_path / "again", wanted, loaded)
    arch_again, again = load_checkpoint(tmp_path / "again", shardings=shardings)
    assert (arch_again.vocab_size, arch_again.mask_id, arch_again.alignment) == (64, 40, "same_position")
    chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(loaded))


def test_other_sizes_are_named(small, saved):
    wrong = dataclasses.replace(small()[0], d_model=32, alignment="shifted", vocab_size=24, rope_theta=5e5, eos_id=3)
    with pytest.raises(UserError) as caught:
        load_checkpoint(saved(), arch=wrong)
    for text in ("d_model is 16, not 32", "alignment is same_position, not shifted", "vocab_size is 40, more than 24"):
        assert text in str(caught.value)
    assert "rope_theta" in str(caught.value) and "eos_id" not in str(caught.value)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2), slow((1, 4, 2)), slow((4, 2, 1))])
def test_an_int8_base_is_what_quantise_makes_of_each_leaf(small, saved, tmp_path, mesh):
    arch, params = small("dream", jnp.bfloat16)
    table = int8.int8_table(registry.param_table(arch))
    shardings = None if mesh is None else param_shardings(make_mesh(*mesh), table)
    _, loaded = load_checkpoint(saved("dream", jnp.bfloat16), int8=True, shardings=shardings)
    plain = params["blocks"]
    assert loaded["blocks"].keys() == {p.removeprefix("blocks/") for p in table if p.startswith("blocks/")}
    for name, leaf in loaded["blocks"].items():
        if shardings is not None:
            assert leaf.sharding == shardings["blocks"][name]
        if leaf.dtype != jnp.int8:
            continue
        numbers, scale = np.asarray(leaf, np.float32), np.asarray(loaded["blocks"][name + int8.SCALE])
        assert scale.dtype == np.float32 and np.abs(numbers).max() == 127
        error = np.abs(numbers * scale[:, None] - np.asarray(plain[name], np.float32))
        assert (error <= scale[:, None] * 0.51).all()
    np.testing.assert_array_equal(loaded["embed"], params["embed"])
    with pytest.raises(UserError, match=r"int8 base is a rounded copy \(blocks/q.*without int8"):
        save_checkpoint(tmp_path / "again", arch, loaded)


def test_the_transpose_on_an_accelerator_is_the_hosts(saved, monkeypatch):
    """For a CPU matrices are transposed on the host; other devices are sent what the file holds, and transpose it."""
    folder = saved("dream", jnp.bfloat16)
    grown = dataclasses.replace(read_architecture(folder), vocab_size=48)
    shardings = param_shardings(make_mesh(2, 2, 2), registry.param_table(grown))
    load = partial(load_checkpoint, folder, arch=grown, shardings=shardings)
    here = jax.device_get(load()[1])
    monkeypatch.setattr(placement, "_transposed_on_cpu", lambda host, transpose, devices: (host, transpose))
    chex.assert_trees_all_equal(jax.device_get(load()[1]), here)


_PEAK = """
import resource, sys
from jaxblock.huggingface.load import load_checkpoint
import jax, numpy as np
jax.block_until_ready(jax.numpy.zeros(8) + 1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
_, params = load_checkpoint(sys.argv[1])
print(peak() - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux's units")
def test_the_host_never_holds_the_checkpoint_twice(small, tmp_path):
    """On a CPU the parameters themselves are host memory, so the peak is one copy and a layer, not two copies."""
    sizes = {"vocab_size": 2048, "d_model": 512, "n_layers": 12, "n_heads": 8, "n_kv_heads": 8, "head_dim": 64}
    arch = dataclasses.replace(small()[0], **sizes, mlp_dim=1536)
    flat = {path: np.zeros(spec.shape, np.float32) for path, spec in registry.param_table(arch).items()}
    save_checkpoint(tmp_path / "out", arch, nest(flat), max_shard_bytes=20_000_000)
    del flat
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.split())
    per_layer = 4 * (4 * 512 * 512 + 3 * 512 * 1536)
    assert grown < 1.2 * (size + per_layer) + 32e6, (grown, size)

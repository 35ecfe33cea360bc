"""Finds and reads the weights that a run begins with: random ones, another run's, or a Hugging Face folder's.

The weights are trained whole, or they are the frozen base beneath adapters, which is known again by its content.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from jaxblock.config.config import Config
from jaxblock.data.store.prepared_folder import Prepared
from jaxblock.errors import UserError
from jaxblock.huggingface.load import load_checkpoint, read_architecture
from jaxblock.huggingface.placement import quantise_parameter
from jaxblock.io.files import read_bytes
from jaxblock.io.hub import local_checkpoint
from jaxblock.io.paths import as_path
from jaxblock.models.architecture import Architecture
from jaxblock.models.config import Checkpoint, Quantize
from jaxblock.models.families import registry
from jaxblock.models.linear import int8
from jaxblock.models.linear.lora import adapter_table, attach, lora_from_config, merge
from jaxblock.models.spec import Table, abstract_params, count_params, flatten, init_params, nest
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.checkpoints.run_folder import Base, Run
from jaxblock.types import Params

_SAMPLE = 1 << 16  # bytes of a file's start and end that go into a fingerprint


class Weights(NamedTuple):
    """Holds the weights that a run begins with.

    Attributes:
        trained: the adapters, or the whole network.
        frozen: the base beneath adapters; {} where the whole network is trained.
        base: where this base came from; None where the whole network is trained.
        source: the folder that all of it came from; None for random weights.
    """

    trained: Params
    frozen: Params
    base: Base | None
    source: str | None


def architecture(config: Config, prepared: Prepared, run: Run | None) -> Architecture:
    """Returns the network that a run trains, from small files alone.

    Args:
        config: the run's settings, checked.
        prepared: the data, whose tokenizer must be the weights'.
        run: the run that is resumed; None for a start.

    Raises:
        UserError: the source is no checkpoint, or is of another vocabulary.
    """
    if run is not None:
        return run.arch
    if config.model.init_from is not None:
        return _source_architecture(local_checkpoint(config.model.init_from, weights=False), config, prepared)
    special, vocab = prepared.special, prepared.manifest.vocab_size
    return registry.architecture_from_config(config.model, vocab_size=vocab, mask_id=special.mask, eos_id=special.eos)


def starting_weights(config: Config, net: Transformer, mesh: Mesh, run: Run | None, console: Console) -> Weights:
    """Returns the weights before the first step; of a resumed run, ones whose trained part a checkpoint will replace.

    Args:
        config: the run's settings, checked.
        net: the network, built for ``architecture``.
        mesh: the devices that hold them.
        run: the run that is resumed; None for a start.
        console: prints where the weights came from.

    Raises:
        UserError: the weights cannot be read, or are not the base that a resumed run's adapters were trained on.
    """
    source = None if config.model.init_from is None else local_checkpoint(config.model.init_from)
    seed, dtype = config.train.seed, config.model.param_dtype
    if net.lora is not None:
        assert source is not None  # the config's check requires it
        return _adapters_beside_base(config, net, mesh, source, run, console)
    if run is not None:
        # Values come from the checkpoint; random ones hold their place (and their shardings) until then.
        return Weights(_random(net.trainable, seed, dtype, mesh), {}, None, source)
    if source is None:
        console.out(f"random weights: {count_params(net.trainable):,} parameters", highlight=False)
        return Weights(_random(net.trainable, seed, dtype, mesh), {}, None, None)
    if run_folder.is_run(source):
        begun_from = run_folder.open_run(source)
        params, step = load_run_params(begun_from, mesh, dtype, step=config.model.init_step)
        lora = lora_from_config(begun_from.config.lora, registry.param_table(begun_from.arch))
        params = params if lora is None else merge(params, lora)
        where = f"step {step:,} of {source}"
    else:
        params = load_base(source, net.arch, mesh, dtype, step=None, quantize="none")
        where = str(config.model.init_from)
    console.out(f"starting from {where}", highlight=False)
    return Weights(params, {}, None, source)


def _adapters_beside_base(
    config: Config, net: Transformer, mesh: Mesh, source: str, run: Run | None, console: Console
) -> Weights:
    """Returns random adapters beside their frozen base; of a resumed run, beside the base that it was begun with."""
    assert net.lora is not None
    base = identify_base(source, config.model.init_step) if run is None else _check_base(source, run.base)
    # The folder as the config names it, not the local copy of one that is elsewhere.
    base = base._replace(folder=str(config.model.init_from))
    frozen = load_base(source, net.arch, mesh, config.model.param_dtype, step=base.step, quantize=net.quantize)
    if run is None:
        targets = ", ".join(path.removeprefix("blocks/") for path in net.lora.targets)
        counts = f"{count_params(net.trainable):,} in adapters of {targets}"
        console.out(f"starting from {config.model.init_from}: {counts} are trained", highlight=False)
    return Weights(_random(net.trainable, config.train.seed, "float32", mesh), frozen, base, source)


def _random(table: Table, seed: int, dtype: str, mesh: Mesh) -> Params:
    """Draws the parameters of a table, each device its own part."""
    placed = rules.param_shardings(mesh, table)
    params: Params = jax.jit(lambda: init_params(table, seed, dtype), out_shardings=placed)()
    return params


def _source_architecture(source: str, config: Config, prepared: Prepared) -> Architecture:
    """Returns a source's architecture; an autoregressive one takes its mask token and fill from the data's tokenizer."""
    is_run = run_folder.is_run(source)
    if not is_run and config.model.init_step != "latest":
        raise UserError(f"model.init_step is {config.model.init_step}, but {source} is no run: leave it out")
    arch = run_folder.open_run(source).arch if is_run else read_architecture(source)
    special, alignment = prepared.special, config.model.alignment
    if arch.mask_id is None:
        arch = registry.with_mask(arch, special.mask, alignment)
        arch = dataclasses.replace(arch, eos_id=special.eos, end_ids=(), pad_id=special.eos)
    elif alignment not in (None, arch.alignment):
        raise UserError(
            f"model.alignment is {alignment}, but {source} was trained with {arch.alignment} logits: leave it"
        )
    check_vocabulary(arch, prepared, source)
    return arch


def check_vocabulary(arch: Architecture, prepared: Prepared, source: str) -> None:
    """Raises UserError where checkpoint and tokenizer differ about an id; rows beyond the tokenizer's ids are allowed.

    Args:
        arch: the checkpoint's architecture.
        prepared: the data, with their tokenizer.
        source: the checkpoint's name in the message.
    """
    manifest, special = prepared.manifest, prepared.special
    if manifest.vocab_size > arch.vocab_size:
        raise UserError(
            f"{source} has {arch.vocab_size} embedding rows, but the data's tokenizer has ids up to "
            f"{manifest.vocab_size - 1}: prepare the data with the checkpoint's own tokenizer (data.tokenizer)"
        )
    for name, ours, theirs in (("mask", special.mask, arch.mask_id), ("end-of-sequence", special.eos, arch.eos_id)):
        if ours != theirs:
            raise UserError(
                f"{source} calls {theirs} its {name} token, the data's tokenizer calls {ours} so: prepare the data "
                "with the checkpoint's own tokenizer (data.tokenizer)"
            )


def identify_base(source: str, wanted: Checkpoint = "latest") -> Base:
    """Identifies a base by its content: the headers and ends of its files are read, not all of them.

    Args:
        source: a run or a local Hugging Face folder.
        wanted: which checkpoint of a run.

    Raises:
        UserError: it holds adapters itself, or has no such checkpoint.
    """
    path = as_path(source)
    if run_folder.is_run(source):
        run = run_folder.open_run(source)
        if run.config.lora.rank:
            raise UserError(
                f"{source} holds adapters; adapters on adapters are not supported: export it merged "
                "(`jaxblock export`) and set model.init_from to the export"
            )
        step = run_folder.find_step(run, wanted)
        files = (read_bytes(path / name) for name in (run_folder.MODEL, run_folder.CONFIG))
        content = b"".join(files) + str(step).encode()
        return Base(source, hashlib.sha256(content).hexdigest(), step)
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().length
        with file.open("rb") as handle:
            digest.update(f"{file.name}:{size}".encode() + handle.read(_SAMPLE))
            handle.seek(max(size - _SAMPLE, 0))
            digest.update(handle.read(_SAMPLE))
    return Base(source, digest.hexdigest(), None)


def _check_base(source: str, remembered: Base | None) -> Base:
    """Identifies the base at ``source``; raises UserError where it is not the one that adapters were trained on."""
    assert remembered is not None  # run_folder.open_run checks it
    if not as_path(source).is_dir():
        raise UserError(
            f"{source}, the base of these adapters, is not there: set model.init_from (from Python: `base`) to where it is"
        )
    found = identify_base(source, "latest" if remembered.step is None else remembered.step)
    if found.fingerprint != remembered.fingerprint:
        raise UserError(
            f"{source} is not the base that these adapters were trained on (that was {remembered.folder}, fingerprint "
            f"{remembered.fingerprint[:12]}; this is {found.fingerprint[:12]}): set model.init_from to that one"
        )
    return found


def load_base(
    source: str, arch: Architecture, mesh: Mesh, dtype: str | None, *, step: int | None, quantize: Quantize
) -> Params:
    """Loads whole weights from a run or a Hugging Face folder.

    Args:
        source: the folder.
        arch: the architecture that they are read as.
        mesh: the devices that hold them.
        dtype: the type of the tensors; None keeps each tensor's own.
        step: which checkpoint of a run; None for the newest.
        quantize: ``int8`` quantises the layers' matrices.
    """
    table = registry.param_table(arch)
    if run_folder.is_run(source):
        run = run_folder.open_run(source)
        params, _ = load_run_params(run, mesh, dtype, step="latest" if step is None else step)
        return _quantised(params, table, mesh) if quantize == "int8" else params
    to_int8 = quantize == "int8"
    placed = rules.param_shardings(mesh, int8.int8_table(table) if to_int8 else table)
    return load_checkpoint(source, dtype=dtype, shardings=placed, arch=arch, int8=to_int8)[1]


def _quantised(params: Params, table: Table, mesh: Mesh) -> Params:
    """Rounds the layers' matrices to int8 with their scales, each placed as its table says."""
    placed = flatten(rules.param_shardings(mesh, int8.int8_table(table)))
    flat: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        if int8.quantised(table[path]):
            scale = path + int8.SCALE
            flat[path], flat[scale] = quantise_parameter(leaf, placed[path], placed[scale])
        else:
            flat[path] = leaf
    return nest(flat)


def load_run_params(
    run: Run,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    *,
    step: Checkpoint = "latest",
    base: str | None = None,
    quantize: Quantize = "none",
) -> tuple[Params, int]:
    """Loads the parameters of a run's checkpoint (their average, where the run kept one), adapters with their base.

    Args:
        run: the run.
        mesh: the devices that hold them; None for one device.
        dtype: the type of the parameters (adapters stay float32); None for the type they were trained in.
        step: which checkpoint.
        base: where the adapters' base is now; None for where it was.
        quantize: ``int8`` quantises the adapters' base.

    Returns:
        (parameters, the checkpoint's step).

    Raises:
        UserError: there is no checkpoint, it does not fit model.json, or the base is another.
    """
    step = run_folder.find_step(run, step)
    mesh = mesh or make_mesh(1, devices=jax.local_devices()[:1])
    table, param_dtype = registry.param_table(run.arch), run.config.model.param_dtype
    lora = lora_from_config(run.config.lora, table)
    if lora is None:
        return _restore_trained(run, step, table, param_dtype, dtype or param_dtype, mesh), step
    adapters = _restore_trained(run, step, adapter_table(table, lora), "float32", "float32", mesh)
    source = local_checkpoint(base or str(run.config.model.init_from))
    found = _check_base(source, run.base)
    frozen = load_base(source, run.arch, mesh, dtype or param_dtype, step=found.step, quantize=quantize)
    return attach(frozen, adapters), step


def _restore_trained(run: Run, step: int, table: Table, stored: str, dtype: str, mesh: Mesh) -> Params:
    """Restores what a run trained from a checkpoint: its average, which is float32, where the run kept one.

    Args:
        run: the run.
        step: which checkpoint.
        table: the specs of what was trained.
        stored: the type that was trained in.
        dtype: the type to return.
        mesh: the devices that hold it.
    """
    averaged = run.config.optimizer.ema > 0
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract_params(table, "float32" if averaged else stored),
        rules.param_shardings(mesh, table),
    )
    checkpoints = CheckpointReader(run.folder)
    run_folder.check_model(run, checkpoints.meta(step))
    params = checkpoints.restore_params(step, like, average=averaged)
    checkpoints.close()
    if averaged and stored != "float32":
        # Rounded as the trained weights are, then to what was asked for.
        params = jax.tree.map(functools.partial(_cast, dtype=stored), params)
    return jax.tree.map(functools.partial(_cast, dtype=dtype), params)


def _cast(leaf: jax.Array, dtype: str) -> jax.Array:
    return leaf.astype(dtype)

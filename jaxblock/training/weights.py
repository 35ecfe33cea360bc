"""Where a run's weights come from: random, another run, or a Hugging Face folder; trained whole, or beneath adapters."""

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
from jaxblock.models.config import Checkpoint
from jaxblock.models.families import registry
from jaxblock.models.linear import int8
from jaxblock.models.linear.lora import Lora, adapter_table, attach, lora_from_config, merge
from jaxblock.models.spec import Table, abstract_params, count_params, flatten, init_params, nest
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.checkpoints.run_folder import Base, Run
from jaxblock.types import Params

_SAMPLE = 1 << 16  # bytes of a file's start and end that go into a fingerprint


class Weights(NamedTuple):
    """What a run begins with.

    Attributes:
        arch: sizes and ids.
        lora: what is adapted; None where the whole network is trained.
        trained: the adapters, or the whole network.
        frozen: the base beneath adapters; {} without.
        base: where the base came from.
        source: the folder all of it came from; None for random weights.
    """

    arch: Architecture
    lora: Lora | None
    trained: Params
    frozen: Params
    base: Base | None
    source: str | None


def architecture(config: Config, prepared: Prepared, run: Run | None) -> Architecture:
    """The network that ``begin`` will give weights to, from small files alone.

    Args:
        config: resolved and valid.
        prepared: the data.
        run: the run that is resumed; None for a start.

    Raises:
        UserError: the source is no checkpoint, or is of another vocabulary.
    """
    if run is not None:
        return run.arch
    if config.model.init_from is not None:
        return _architecture(local_checkpoint(config.model.init_from, weights=False), config, prepared)
    special, vocab = prepared.special, prepared.manifest.vocab_size
    return registry.architecture_from_config(config.model, vocab_size=vocab, mask_id=special.mask, eos_id=special.eos)


def begin(config: Config, prepared: Prepared, mesh: Mesh, run: Run | None, console: Console) -> Weights:
    """The weights before the first step, or (with ``run``) ones whose trained part a checkpoint will replace.

    Args:
        config: resolved and valid.
        prepared: the data: its tokenizer must be the weights'.
        mesh: where they go.
        run: the run that is resumed; None for a start.
        console: where people are told where they came from.

    Raises:
        UserError: the source is no checkpoint, is of another vocabulary, or is not the base that a resumed run's
            adapters were trained on.
    """
    source = None if config.model.init_from is None else local_checkpoint(config.model.init_from)
    seed, dtype = config.train.seed, config.model.param_dtype
    if config.lora.rank:
        assert source is not None  # config_io checks it
        arch = run.arch if run is not None else _architecture(source, config, prepared)
        lora = lora_from_config(config.lora, registry.param_table(arch))
        assert lora is not None
        base = _check_base(source, run.base) if run is not None else identify(source, config.model.init_step)
        base = base._replace(folder=str(config.model.init_from))  # not the copy of one that is elsewhere
        frozen = read_base(source, arch, mesh, dtype, base.step, config.model.quantize == "int8")
        table = adapter_table(registry.param_table(arch), lora)
        if run is None:
            counts = f"{count_params(table):,} in adapters of {', '.join(_short(lora))}"
            console.out(f"starting from {config.model.init_from}: {counts} are trained", highlight=False)
        return Weights(arch, lora, _random(table, seed, "float32", mesh), frozen, base, source)
    if run is not None:
        # Values come from the checkpoint; random ones hold their place (and their shardings) until then.
        return Weights(run.arch, None, _random(registry.param_table(run.arch), seed, dtype, mesh), {}, None, source)
    if source is None:
        arch = architecture(config, prepared, None)
        table = registry.param_table(arch)
        console.out(f"random weights: {count_params(table):,} parameters", highlight=False)
        return Weights(arch, None, _random(table, seed, dtype, mesh), {}, None, None)
    arch = _architecture(source, config, prepared)
    if run_folder.is_run(source):
        params, step, lora = read_run(run_folder.open_run(source), mesh, dtype, step=config.model.init_step)
        where = f"step {step:,} of {source}"
        params = params if lora is None else merge(params, lora)
    else:
        where = str(config.model.init_from)
        params = read_base(source, arch, mesh, dtype, None, False)
    console.out(f"starting from {where}", highlight=False)
    return Weights(arch, None, params, {}, None, source)


def _short(lora: Lora) -> list[str]:
    return [path.removeprefix("blocks/") for path in lora.targets]


def _random(table: Table, seed: int, dtype: str, mesh: Mesh) -> Params:
    placed = rules.param_shardings(mesh, table)
    params: Params = jax.jit(lambda: init_params(table, seed, dtype), out_shardings=placed)()
    return params


def _architecture(source: str, config: Config, prepared: Prepared) -> Architecture:
    """A source's architecture; an autoregressive one takes its mask token and fill from the data's tokenizer."""
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
    """Raises UserError where checkpoint and tokenizer differ about an id. Padding rows beyond the tokenizer are fine."""
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


def identify(source: str, wanted: Checkpoint = "latest") -> Base:
    """Names a base by its content. Headers and ends of the files are read, not all of them.

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
    """The base at ``source``, which must be the one that adapters were trained on.

    Raises:
        UserError: it is another.
    """
    assert remembered is not None  # run_folder.open_run checks it
    if not as_path(source).is_dir():
        raise UserError(
            f"{source}, the base of these adapters, is not there: set model.init_from (from Python: `base`) to where it is"
        )
    found = identify(source, "latest" if remembered.step is None else remembered.step)
    if found.fingerprint != remembered.fingerprint:
        raise UserError(
            f"{source} is not the base that these adapters were trained on (that was {remembered.folder}, fingerprint "
            f"{remembered.fingerprint[:12]}; this is {found.fingerprint[:12]}): set model.init_from to that one"
        )
    return found


def read_base(
    source: str, arch: Architecture, mesh: Mesh, dtype: str | None, step: int | None, to_int8: bool
) -> Params:
    """Reads whole weights from a run or a Hugging Face folder.

    Args:
        source: the folder.
        arch: what they are read as.
        mesh: where they go.
        dtype: their type; None keeps each tensor's own.
        step: the checkpoint of a run; None for the newest.
        to_int8: quantise the layers' matrices.
    """
    table = registry.param_table(arch)
    if run_folder.is_run(source):
        run = run_folder.open_run(source)
        params, _, _ = read_run(run, mesh, dtype, step="latest" if step is None else step)
        return _quantised(params, table, mesh) if to_int8 else params
    placed = rules.param_shardings(mesh, int8.int8_table(table) if to_int8 else table)
    return load_checkpoint(source, dtype=dtype, shardings=placed, arch=arch, int8=to_int8)[1]


def _quantised(params: Params, table: Table, mesh: Mesh) -> Params:
    placed = flatten(rules.param_shardings(mesh, int8.int8_table(table)))
    flat: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        if int8.quantised(table[path]):
            scale = path + int8.SCALE
            flat[path], flat[scale] = quantise_parameter(leaf, placed[path], placed[scale])
        else:
            flat[path] = leaf
    return nest(flat)


def read_run(
    run: Run,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    *,
    step: Checkpoint = "latest",
    base: str | None = None,
    to_int8: bool = False,
) -> tuple[Params, int, Lora | None]:
    """The parameters of a run's checkpoint (their average, where the run kept one); adapters come with their base.

    Args:
        run: the run.
        mesh: where they go; None for one device.
        dtype: their type (adapters stay float32); None for the type they were trained in.
        step: which checkpoint.
        base: where the adapters' base is now; None for where it was.
        to_int8: quantise the adapters' base.

    Returns:
        (parameters, step, what is adapted).

    Raises:
        UserError: there is no checkpoint, it does not fit model.json, or the base is another.
    """
    step = run_folder.find_step(run, step)
    checkpoints = CheckpointReader(run.folder)
    run_folder.check_model(run, checkpoints.meta(step))
    mesh = mesh or make_mesh(1, devices=jax.local_devices()[:1])
    lora = lora_from_config(run.config.lora, registry.param_table(run.arch))
    table = registry.param_table(run.arch)
    trained, stored = (table, run.config.model.param_dtype) if lora is None else (adapter_table(table, lora), "float32")
    averaged = run.config.optimizer.ema > 0
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract_params(trained, "float32" if averaged else stored),
        rules.param_shardings(mesh, trained),
    )
    params = checkpoints.restore_params(step, like, average=averaged)
    if averaged and stored != "float32":
        params = jax.tree.map(functools.partial(_cast, dtype=stored), params)
    checkpoints.close()
    if lora is None:
        if dtype is not None:
            params = jax.tree.map(functools.partial(_cast, dtype=dtype), params)
        return params, step, None
    source = local_checkpoint(base or str(run.config.model.init_from))
    found = _check_base(source, run.base)
    frozen = read_base(source, run.arch, mesh, dtype or run.config.model.param_dtype, found.step, to_int8)
    return attach(frozen, params), step, lora


def _cast(leaf: jax.Array, dtype: str) -> jax.Array:
    return leaf.astype(dtype)

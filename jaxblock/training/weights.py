"""Provides the weights that a run begins with: random ones, or those of another run or of a Hugging Face folder.

The whole network is trained, or it is the frozen base of adapters, which are trained.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from jaxblock.config.config import Config
from jaxblock.data.store.prepared_folder import Prepared
from jaxblock.data.store.same_text import CheckpointText, check_same_text
from jaxblock.errors import UserError
from jaxblock.huggingface.load import read_architecture
from jaxblock.io.hub import local_checkpoint
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import lora_from_config, merge
from jaxblock.models.spec import Table, count_params, init_params
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import rules
from jaxblock.parallel.compiling import quick_options
from jaxblock.training.base_identity import check_base, identify_base
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.checkpoints.run_folder import Base, Run
from jaxblock.training.stored_text import read_text, text_of_run
from jaxblock.training.stored_weights import load_base, load_run_params
from jaxblock.types import Params


class Weights(NamedTuple):
    """Holds the weights that a run begins with.

    Attributes:
        trained: the weights that are trained: the adapters where there are any, else the whole network.
        frozen: the frozen base of the adapters; {} where the whole network is trained.
        base: where the frozen base came from; None where the whole network is trained.
        source: the local folder that the network's weights came from; None for random weights.
    """

    trained: Params
    frozen: Params
    base: Base | None
    source: str | None


def architecture(config: Config, prepared: Prepared, run: Run | None) -> Architecture:
    """Returns the architecture of the network that a run trains, without reading weights.

    Args:
        config: the run's settings, checked.
        prepared: the prepared data; its tokenizer must fit the source's vocabulary.
        run: the run that is resumed; None for a new run.

    Raises:
        UserError: the source is no checkpoint, or its vocabulary does not fit the data.
    """
    if run is not None:
        return run.arch
    if config.model.init_from is not None:
        return _source_architecture(local_checkpoint(config.model.init_from, weights=False), config, prepared)
    special, vocab = prepared.special, prepared.manifest.vocab_size
    return registry.architecture_from_config(
        config.model, vocab_size=vocab, mask_id=special.mask, eos_id=special.eos, pad_id=special.pad
    )


def starting_weights(config: Config, net: Transformer, mesh: Mesh, console: Console) -> Weights:
    """Returns the weights of a new run before its first step.

    Args:
        config: the run's settings, checked.
        net: the network, built for ``architecture``.
        mesh: the devices that hold them.
        console: prints where the weights came from.

    Raises:
        UserError: the weights cannot be read.
    """
    source = None if config.model.init_from is None else local_checkpoint(config.model.init_from)
    seed, dtype = config.train.seed, config.model.param_dtype
    if net.lora is not None:
        assert source is not None  # the config's check requires it
        frozen, base = _load_frozen(config, net, mesh, source, identify_base(source, config.model.init_step))
        targets = ", ".join(path.removeprefix("blocks/") for path in net.lora.targets)
        counts = f"{count_params(net.trainable):,} in adapters of {targets}"
        console.out(f"starting from {config.model.init_from}: {counts} are trained", highlight=False)
        return Weights(_random(net.trainable, seed, "float32", mesh), frozen, base, source)
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


def resumed_base(config: Config, net: Transformer, mesh: Mesh, run: Run) -> tuple[Params, Base | None]:
    """Reads the frozen base of a resumed run, whose trained weights are in its checkpoint.

    Args:
        config: the run's settings, checked.
        net: the network, built for ``architecture``.
        mesh: the devices that hold the base.
        run: the run that is resumed.

    Returns:
        (base, where it came from); ({}, None) where the whole network is trained.

    Raises:
        UserError: the base cannot be read, or is not the one that the run's adapters were trained on.
    """
    if net.lora is None:
        return {}, None
    source = local_checkpoint(str(config.model.init_from))
    return _load_frozen(config, net, mesh, source, check_base(source, run.base))


def _load_frozen(config: Config, net: Transformer, mesh: Mesh, source: str, base: Base) -> tuple[Params, Base]:
    """Reads the frozen base beneath adapters, and names its folder as the config does, not by its local copy."""
    frozen = load_base(source, net.arch, mesh, config.model.param_dtype, step=base.step, quantize=net.quantize)
    return frozen, base._replace(folder=str(config.model.init_from))


def _random(table: Table, seed: int, dtype: str, mesh: Mesh) -> Params:
    """Draws the parameters of a table; each device draws its own part."""
    placed = rules.param_shardings(mesh, table)
    options = quick_options(mesh.devices.flat, count_params(table))
    params: Params = jax.jit(lambda: init_params(table, seed, dtype), out_shardings=placed, compiler_options=options)()
    return params


def _source_architecture(source: str, config: Config, prepared: Prepared) -> Architecture:
    """Returns a source's architecture; an autoregressive one gets its mask and fill tokens from the data's tokenizer.

    Raises UserError where the source does not fit the data: vocabulary, special ids, tokenizer or chat template.
    """
    if not run_folder.is_run(source) and config.model.init_step != "latest":
        raise UserError(f"model.init_step is {config.model.init_step}, but {source} is no run: leave it out")
    run = run_folder.open_run(source) if run_folder.is_run(source) else None
    own = arch = read_architecture(source) if run is None else run.arch
    special, alignment = prepared.special, config.model.alignment
    if arch.mask_id is None:
        arch = registry.with_end(registry.with_mask(arch, special.mask, alignment), special.eos)
    elif alignment not in (None, arch.alignment):
        raise UserError(
            f"model.alignment is {alignment}, but {source} was trained with {arch.alignment} logits: leave it"
        )
    check_vocabulary(arch, prepared, source)
    text = read_text(source, own) if run is None else text_of_run(run)
    if text.tokenizer is not None:
        found = CheckpointText(str(config.model.init_from), text.tokenizer, text.encoder, text.recorded)
        check_same_text(found, prepared, allow_other_template=config.data.allow_other_template)
    return arch


def check_vocabulary(arch: Architecture, prepared: Prepared, source: str) -> None:
    """Raises UserError where the tokenizer does not fit the checkpoint; more embedding rows than token ids are allowed.

    Args:
        arch: the checkpoint's architecture.
        prepared: the data, with their tokenizer.
        source: the checkpoint's name in the message.
    """
    manifest, special = prepared.manifest, prepared.special
    if manifest.vocab_size > arch.vocab_size:
        raise UserError(
            f"{source} has {arch.vocab_size} embedding rows, but the data's tokenizer has ids up to "
            f"{manifest.vocab_size - 1} ({prepared.folder}): prepare the data with the checkpoint's own tokenizer (data.tokenizer)"
        )
    for name, ours, theirs in (("mask", special.mask, arch.mask_id), ("end-of-sequence", special.eos, arch.eos_id)):
        if ours != theirs:
            raise UserError(
                f"{source} calls {theirs} its {name} token, the data's tokenizer calls {ours} so ({prepared.folder}): prepare the data "
                "with the checkpoint's own tokenizer (data.tokenizer)"
            )

"""Loads stored weights, from a run's checkpoint or a Hugging Face folder, onto the devices."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from jaxblock.huggingface.load import load_checkpoint
from jaxblock.huggingface.placement import quantise_parameter
from jaxblock.io.hub import local_checkpoint
from jaxblock.models.architecture import Architecture
from jaxblock.models.config import Checkpoint, Quantize
from jaxblock.models.families import registry
from jaxblock.models.linear import int8
from jaxblock.models.linear.lora import adapter_table, attach, lora_from_config
from jaxblock.models.spec import Table, abstract_params, flatten, nest
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.base_identity import check_base
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.checkpoints.run_folder import Run
from jaxblock.types import Params


def load_run_params(
    run: Run,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    *,
    step: Checkpoint = "latest",
    base: str | None = None,
    quantize: Quantize = "none",
) -> tuple[Params, int]:
    """Loads the parameters of a run's checkpoint, or their moving average where the run kept one; adapters with their base.

    Args:
        run: the run.
        mesh: the devices that will hold the parameters; None for one device.
        dtype: the type of the parameters (adapters stay float32); None for the type that they were trained in.
        step: the checkpoint to load.
        base: the folder where the adapters' base is now; None for the one that the run's config names.
        quantize: ``int8`` quantises the adapters' base.

    Returns:
        (parameters, the checkpoint's step).

    Raises:
        UserError: there is no such checkpoint, it does not fit model.json, or the base is not the one of the adapters.
    """
    step = run_folder.find_step(run, step)
    mesh = mesh or _one_device()
    table, param_dtype = registry.param_table(run.arch), run.config.model.param_dtype
    lora = lora_from_config(run.config.lora, table)
    if lora is None:
        return _restore_trained(run, step, table, param_dtype, dtype or param_dtype, mesh), step
    adapters = _restore_trained(run, step, adapter_table(table, lora), "float32", "float32", mesh)
    source = local_checkpoint(base or str(run.config.model.init_from))
    found = check_base(source, run.base)
    frozen = load_base(source, run.arch, mesh, dtype or param_dtype, step=found.step, quantize=quantize)
    return attach(frozen, adapters), step


def load_base(
    source: str, arch: Architecture, mesh: Mesh | None, dtype: str | None, *, step: int | None, quantize: Quantize
) -> Params:
    """Loads whole weights from a run or a Hugging Face folder.

    Args:
        source: the folder.
        arch: the architecture to read the weights as.
        mesh: the devices that will hold the weights; None for one device.
        dtype: the type of the tensors; None keeps each tensor's own.
        step: the step of the checkpoint, where the source is a run; None for the newest.
        quantize: ``int8`` quantises the layers' matrices.
    """
    table = registry.param_table(arch)
    if run_folder.is_run(source):
        run = run_folder.open_run(source)
        params, _ = load_run_params(run, mesh, dtype, step="latest" if step is None else step)
        return _quantised(params, table, mesh or _one_device()) if quantize == "int8" else params
    to_int8 = quantize == "int8"
    placed = None if mesh is None else rules.param_shardings(mesh, int8.int8_table(table) if to_int8 else table)
    return load_checkpoint(source, dtype=dtype, shardings=placed, arch=arch, int8=to_int8)[1]


def _restore_trained(run: Run, step: int, table: Table, stored: str, dtype: str, mesh: Mesh) -> Params:
    """Restores the trained parameters from a checkpoint, or their average (in float32) where the run kept one.

    Args:
        run: the run.
        step: the step of the checkpoint.
        table: the specs of the trained parameters.
        stored: the type in which they were trained.
        dtype: the type to return.
        mesh: the devices that will hold the parameters.
    """
    averaged = run.config.optimizer.ema > 0
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract_params(table, "float32" if averaged else stored),
        rules.param_shardings(mesh, table),
    )
    with contextlib.closing(CheckpointReader(run.folder)) as checkpoints:
        run_folder.check_model(run, checkpoints.meta(step))
        params = checkpoints.restore_params(step, like, average=averaged)
    if averaged and stored != "float32":
        # The average is rounded first as the trained weights are, then to the requested type.
        params = jax.tree.map(functools.partial(_cast, dtype=stored), params)
    return jax.tree.map(functools.partial(_cast, dtype=dtype), params)


def _quantised(params: Params, table: Table, mesh: Mesh) -> Params:
    """Rounds the layers' matrices to int8; each matrix and its scales are placed as the table says."""
    placed = flatten(rules.param_shardings(mesh, int8.int8_table(table)))
    flat: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        if int8.quantised(table[path]):
            scale = path + int8.SCALE
            flat[path], flat[scale] = quantise_parameter(leaf, placed[path], placed[scale])
        else:
            flat[path] = leaf
    return nest(flat)


def _one_device() -> Mesh:
    """Returns a mesh of this process's first device."""
    return make_mesh(1, devices=jax.local_devices()[:1])


def _cast(leaf: jax.Array, dtype: str) -> jax.Array:
    return leaf.astype(dtype)

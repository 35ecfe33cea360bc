"""Decides whether a checkpoint's folder is whole and undamaged.

A checkpoint is whole when its checksums are there, because they are written last. One without any (it is older than
the checksums, or its process was killed just before it wrote them) counts as whole if Orbax committed it; before a run
continues from it, all of it is read.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from jaxblock.errors import UserError, first_line
from jaxblock.io.paths import is_remote
from jaxblock.parallel import processes
from jaxblock.training.checkpoints import checksums, removal

PARAMS, OPTIMIZER, AVERAGE, META = "params", "optimizer", "average", "meta"
"""The names of a checkpoint's folders, for trained parameters, optimizer state, average of parameters and plain values."""


def is_whole(folder: epath.Path) -> bool:
    """Tells whether a checkpoint was finished, judging only by the names of its files."""
    return checksums.is_sealed(folder) or (not checksums.has_lists(folder) and _is_committed(folder))


def find_damage(folder: epath.Path, under: str = "") -> str | None:
    """Returns what is wrong with a checkpoint; None where nothing is. Every process of a group must call this.

    Args:
        folder: the checkpoint's folder, named by its step.
        under: compare checksums only of the files whose names inside the folder begin with this.

    Raises:
        UserError: a file may not be read.
    """
    try:
        if checksums.has_lists(folder):
            share = (jax.process_index(), jax.process_count())
            return processes.first_problem(checksums.find_difference(folder, under, *share) or _other_step(folder))
    except PermissionError as error:
        raise UserError(f"cannot read {os.fspath(folder)}: permission denied") from error
    return processes.first_problem(_why_unreadable(folder))


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """Reads the plain values saved with a checkpoint.

    Raises:
        OSError: they cannot be read.
        ValueError: they are not JSON.
    """
    try:
        return dict(ocp.JsonCheckpointHandler().restore(folder / META))
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error


def _is_committed(folder: epath.Path) -> bool:
    """Tells whether Orbax has finished the checkpoint and no deletion of it has begun."""
    return not removal.is_being_deleted(folder) and bool(ocp.path.step.is_path_finalized(folder))


def _why_unreadable(folder: epath.Path) -> str | None:
    """Returns what goes wrong when a checkpoint without checksums is read completely; None if nothing does."""
    if not _is_committed(folder):
        return "it was never finished"
    try:
        average = [AVERAGE] if (folder / AVERAGE).exists() else []
        for item in (PARAMS, OPTIMIZER, *average):
            _read_all(folder / item)
    except Exception as error:  # Orbax and TensorStore raise many kinds of errors at a damaged file
        return f"it has no checksums and cannot be read ({first_line(error)})"
    return _other_step(folder)


def _other_step(folder: epath.Path) -> str | None:
    """Returns what is wrong where a checkpoint is of another step than its folder's name says; None where it is not."""
    try:
        step = read_meta(folder).get("step", int(folder.name))  # the first versions did not save it
    except (OSError, ValueError, TypeError) as error:
        return f"its plain values cannot be read ({first_line(error)})"
    return None if step == int(folder.name) else f"it is of step {step} and was renamed"


def _read_all(item: epath.Path) -> None:
    """Reads every stored piece of an item, one after the other, so that the item need not fit into memory.

    Raises:
        ValueError: there are no pieces, or one cannot be read.
    """
    if not (item / "_METADATA").exists():
        raise ValueError(f"{item.name}/_METADATA is missing")
    path = os.fspath(item)
    base = path.rstrip("/") + "/" if is_remote(item) else f"file://{path}/"
    stored = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = stored.list().result()
    if not keys:
        raise ValueError(f"{item.name} holds no arrays")
    for key in keys:
        stored.read(key).result()

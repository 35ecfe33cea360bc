"""Removes checkpoints so that a kill at any moment leaves nothing that looks whole, and sets damaged ones aside.

Orbax's manager deletes a folder file by file under its own name, and in an object store in no particular order: a kill
in the middle would leave a checkpoint that looks whole and is not.
"""

from __future__ import annotations

import contextlib
import os

import orbax.checkpoint as ocp
from etils import epath

from jaxblock.errors import UserError, first_line
from jaxblock.io.folders import move_folder
from jaxblock.io.paths import is_remote
from jaxblock.training.checkpoints import checksums

DAMAGED_FOLDER = "damaged"
"""The folder beside ``checkpoints`` to which damaged checkpoints are moved, unchanged."""
_DELETING = ".deleting"


def delete(folder: epath.Path) -> None:
    """Deletes a checkpoint so that it does not look whole at any moment.

    On a local disk its folder is renamed first. An object store cannot rename: there a marker beside the folder says
    that it is being deleted, and the checksums, without which it is not whole, are deleted first.
    """
    leaving = _leaving(folder)
    if not is_remote(folder):
        os.rename(folder, leaving)
        leaving.rmtree()
        return
    leaving.mkdir(parents=True, exist_ok=True)
    (leaving / "begun").write_text(folder.name)
    checksums.unseal(folder)
    folder.rmtree()
    leaving.rmtree()


def is_being_deleted(folder: epath.Path) -> bool:
    """Tells whether a deletion of the checkpoint has begun."""
    return bool(_leaving(folder).exists())


def discard_unfinished(folder: epath.Path) -> None:
    """Removes what a failed save has written, but never a whole checkpoint.

    Args:
        folder: the folder that the checkpoint was to have.
    """
    for temporary, final in _uncommitted(folder.parent):
        if final == folder:
            temporary.rmtree()
    if folder.exists() and not checksums.is_sealed(folder):
        delete(folder)


def sweep(root: epath.Path) -> None:
    """Removes what a killed process left: uncommitted saves and half-deleted checkpoints.

    Args:
        root: the folder of all checkpoints.
    """
    with contextlib.suppress(OSError):  # a run can go on from a read-only disk
        for entry in list(root.iterdir()) if root.exists() else []:
            if entry.name.endswith(_DELETING):
                folder = root / entry.name.removesuffix(_DELETING)
                if is_remote(root) and folder.exists():
                    folder.rmtree()
                entry.rmtree()
        for temporary, _ in _uncommitted(root):
            temporary.rmtree()


def set_aside(folder: epath.Path) -> str:
    """Moves a damaged checkpoint out of the way, for a person to look at; it is never deleted.

    Args:
        folder: the checkpoint's folder, in the folder of all checkpoints of a run.

    Returns:
        Where it is now, or why it could not be moved, as the end of a message.
    """
    damaged = folder.parent.parent / DAMAGED_FOLDER
    number = 1
    while (target := damaged / (folder.name if number == 1 else f"{folder.name}-{number}")).exists():
        number += 1
    try:
        damaged.mkdir(parents=True, exist_ok=True)
        move_folder(folder, target)
    except (OSError, UserError) as error:
        return f"left where it is ({first_line(error)})"
    return f"moved to {os.fspath(target)}"


def _uncommitted(root: epath.Path) -> list[tuple[epath.Path, epath.Path]]:
    """Lists the folders that Orbax has not committed, each with the name that it was to get.

    None are listed in an object store. There Orbax writes under the final name from the beginning, and a folder without its
    commit marker may be a damaged checkpoint that lost it; damaged checkpoints are not deleted.
    """
    if is_remote(root):
        return []
    found = [(path.get(), path.get_final()) for path in ocp.path.step.all_temporary_paths(root)]
    return [(temporary, final) for temporary, final in found if temporary != final]


def _leaving(folder: epath.Path) -> epath.Path:
    return folder.parent / (folder.name + _DELETING)
